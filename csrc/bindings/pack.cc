#include "store/pack/pack.h"

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "bindings/bindings.h"
#include "store/io_scratch.h"

namespace sluice::bindings {
namespace {

using WithoutGil = py::call_guard<py::gil_scoped_release>;

/// A writer that can be closed before its end, which keeps what is written for a resume.
class Writer {
 public:
  Writer(std::string path, PackManifest manifest, bool fresh)
      : writer_(std::make_unique<PackWriter>(std::move(path), std::move(manifest), fresh)) {}
  ~Writer() {
    const py::gil_scoped_release no_gil;  // an unfinished one writes what it has to the disk
    close();
  }
  Writer(const Writer&) = delete;
  Writer& operator=(const Writer&) = delete;

  [[nodiscard]] std::int64_t resumed_experts() const { return open().resumed_experts(); }
  [[nodiscard]] std::int64_t num_experts() const { return open().num_experts(); }

  void append_from(const StoreHandle& store, std::int32_t layer, std::int32_t expert) {
    const ExpertKey key = checked_key(*store.store, layer, expert);
    AlignedBuffer bytes(store.store->layer(key.layer).layout.bytes());
    const std::span<std::byte> out(bytes.data(), store.store->layer(key.layer).layout.bytes());
    store.store->read_expert(key, out);
    open().append(out);
  }
  void finish() { open().finish(); }
  void close() { writer_.reset(); }

 private:
  [[nodiscard]] PackWriter& open() const {
    require<ConfigError>(writer_ != nullptr, [] { return "pack writer: it is closed already"; });
    return *writer_;
  }
  std::unique_ptr<PackWriter> writer_;
};

std::unique_ptr<Writer> make_writer(std::string path, const std::vector<py::dict>& layers,
                                    std::string model_id, std::string revision,
                                    std::string config_sha256, std::string source_fingerprint,
                                    bool fresh) {
  PackManifest manifest{.model_id = std::move(model_id),
                        .revision = std::move(revision),
                        .config_sha256 = std::move(config_sha256),
                        .source_fingerprint = std::move(source_fingerprint),
                        .layers = {}};
  for (const py::dict& layer : layers) manifest.layers.push_back(layer_from_dict(layer));
  const py::gil_scoped_release no_gil;
  return std::make_unique<Writer>(std::move(path), std::move(manifest), fresh);
}

py::tuple open_pack_file(const std::string& path, std::size_t chunk_bytes,
                         const std::string& verify, bool direct, std::uint64_t read_rate) {
  const ExpertStore::Options options = store_options(chunk_bytes, verify, direct, read_rate);
  PackManifest manifest;
  StoreHandle handle;
  {
    const py::gil_scoped_release no_gil;
    handle.store = open_pack(path, options, &manifest);
  }
  py::list layers;
  for (std::int32_t layer = 0; layer < handle.store->num_layers(); ++layer) {
    layers.append(layer_to_dict(*handle.store, LayerIdx{layer}));
  }
  py::dict out;
  out["model_id"] = manifest.model_id;
  out["revision"] = manifest.revision;
  out["config_sha256"] = manifest.config_sha256;
  out["source_fingerprint"] = manifest.source_fingerprint;
  out["layers"] = layers;
  return py::make_tuple(std::move(handle), out);
}

void verify_pack_file(const std::string& path, const std::optional<py::function>& progress) {
  const auto report = [&](std::uint64_t done, std::uint64_t all) {
    const py::gil_scoped_acquire gil;
    if (PyErr_CheckSignals() != 0) throw py::error_already_set();
    if (progress) (*progress)(done, all);
  };
  const py::gil_scoped_release no_gil;
  verify_pack(path, report);
}

}  // namespace

void bind_pack(py::module_& m) {
  py::class_<Writer>(m, "PackWriter", "`layers`: dicts as `Store.layer` gives them.")
      .def(py::init(&make_writer), py::arg("path"), py::arg("layers"), py::kw_only(),
           py::arg("model_id") = "", py::arg("revision") = "", py::arg("config_sha256") = "",
           py::arg("source_fingerprint") = "", py::arg("fresh") = false)
      .def_property_readonly("resumed_experts", &Writer::resumed_experts)
      .def_property_readonly("num_experts", &Writer::num_experts)
      .def("append_from", &Writer::append_from, py::arg("store"), py::arg("layer"),
           py::arg("expert"), WithoutGil())
      .def("finish", &Writer::finish, WithoutGil())
      .def("close", &Writer::close, WithoutGil());
  m.def(
      "open_pack", &open_pack_file, py::arg("path"), py::kw_only(), py::arg("chunk_bytes") = kMiB,
      py::arg("verify") = "first", py::arg("direct") = true, py::arg("read_rate") = 0,
      "The store and the manifest: model_id, revision, config_sha256, source_fingerprint, layers.");
  m.def("verify_pack", &verify_pack_file, py::arg("path"), py::arg("progress") = py::none());
}

}  // namespace sluice::bindings
