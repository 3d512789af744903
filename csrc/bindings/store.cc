#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>
#include <vector>

#include "base/size.h"
#include "bindings/bindings.h"
#include "store/expert_store.h"
#include "store/file.h"
#include "store/fingerprint.h"
#include "store/safetensors.h"

namespace sluice::bindings {
namespace {

using WithoutGil = py::call_guard<py::gil_scoped_release>;

Verify parse_verify(const std::string& name) {
  if (name == "first") return Verify::kFirst;
  if (name == "always") return Verify::kAlways;
  if (name == "never") return Verify::kOff;
  throw ConfigError("verify: got \"" + name + "\", expected first, always or never");
}

Piece::Transform parse_transform(const std::string& name) {
  if (name == "copy") return Piece::Transform::kCopy;
  if (name == "transpose") return Piece::Transform::kTranspose;
  if (name == "widen") return Piece::Transform::kWiden;
  throw ConfigError("transform: got \"" + name + "\", expected copy, transpose or widen");
}

std::size_t section_start(const ExpertLayout& layout, const std::string& section) {
  if (section == "w13") return 0;
  if (section == "w2") return layout.w2_offset();
  require<ConfigError>(section == "b13" || section == "b2", [&] {
    return "section: got \"" + section + "\", expected w13, w2, b13 or b2";
  });
  require<ConfigError>(layout.has_bias,
                       [&] { return "section: got " + section + " in a layer without biases"; });
  return section == "b13" ? layout.b13_offset() : layout.b2_offset();
}

/// The builder and the layouts of its layers, which a section's place depends on.
class Builder {
 public:
  Builder(std::size_t chunk_bytes, const std::string& verify, bool direct, std::uint64_t read_rate)
      : builder_(store_options(chunk_bytes, verify, direct, read_rate)) {}

  std::int32_t add_file(const std::string& path, const std::string& identity) {
    return static_cast<std::int32_t>(builder_.add_file(path, identity));
  }

  std::int32_t add_layer(std::string name, std::int32_t num_experts, const std::string& dtype,
                         std::int64_t hidden, std::int64_t intermediate, bool gated,
                         bool has_bias) {
    const ExpertLayout layout{.dtype = parse_dtype(dtype),
                              .hidden = hidden,
                              .intermediate = intermediate,
                              .gated = gated,
                              .has_bias = has_bias};
    const std::int32_t layer = to_int(builder_.add_layer({std::move(name), num_experts, layout}));
    layouts_.push_back(layout);
    return layer;
  }

  void add_piece(std::int32_t layer, std::int32_t expert, const std::string& section,
                 std::int32_t file, std::uint64_t offset, std::size_t nbytes,
                 std::size_t section_offset, const std::string& transform, std::int64_t rows,
                 std::int64_t columns, const std::string& dtype) {
    require<ConfigError>(layer >= 0 && static_cast<std::size_t>(layer) < layouts_.size(), [&] {
      return "layer: got " + std::to_string(layer) + ", expected one that add_layer gave";
    });
    const ExpertLayout& layout = layouts_[static_cast<std::size_t>(layer)];
    builder_.add_piece(make_key(layer, expert),
                       {.file = FileIdx{file},
                        .offset = offset,
                        .bytes = nbytes,
                        .target_offset = section_start(layout, section) + section_offset,
                        .transform = parse_transform(transform),
                        .rows = rows,
                        .columns = columns,
                        .dtype = parse_dtype(dtype)});
  }

  StoreHandle build(std::string description) {
    builder_.set_description(std::move(description));
    return {builder_.build()};
  }

 private:
  ExpertStoreBuilder builder_;
  std::vector<ExpertLayout> layouts_;
};

void expert_into(const StoreHandle& handle, std::int32_t layer, std::int32_t expert,
                 std::uint64_t address, std::uint64_t nbytes) {
  const ExpertKey key = checked_key(*handle.store, layer, expert);
  handle.store->read_expert(key, {address_of(address, nbytes), nbytes});
}

py::dict header_to_dict(const std::string& path) {
  const SafetensorsHeader header = [&] {
    const py::gil_scoped_release no_gil;
    return read_safetensors_header(path);
  }();
  py::list tensors;
  for (const TensorInfo& tensor : header.tensors) {
    tensors.append(
        py::make_tuple(tensor.name, tensor.dtype, tensor.shape, tensor.offset, tensor.bytes));
  }
  py::dict out;
  out["tensors"] = tensors;
  out["metadata"] = header.metadata;
  out["identity"] = header.file;
  return out;
}

py::tuple size_to_tuple(const py::object& text) {
  const Size size = parse_size(py::str(text).cast<std::string>());
  if (size.kind == Size::Kind::kShare) return py::make_tuple("share", size.share);
  return py::make_tuple("bytes", size.bytes);
}

}  // namespace

ExpertStore::Options store_options(std::size_t chunk_bytes, const std::string& verify, bool direct,
                                   std::uint64_t read_rate) {
  return {.chunk_bytes = chunk_bytes,
          .verify = parse_verify(verify),
          .direct = direct,
          .read_rate = read_rate};
}

ExpertKey checked_key(const ExpertStore& store, std::int64_t layer, std::int64_t expert) {
  require<ConfigError>(layer >= 0 && layer < store.num_layers(), [&] {
    return "layer: got " + std::to_string(layer) + ", expected 0 to " +
           std::to_string(store.num_layers() - 1);
  });
  const ExpertKey key =
      make_key(static_cast<std::int32_t>(layer), static_cast<std::int32_t>(expert));
  const std::int32_t num_experts = store.layer(key.layer).num_experts;
  require<ConfigError>(expert >= 0 && expert < num_experts, [&] {
    return "expert: got " + std::to_string(expert) + ", expected 0 to " +
           std::to_string(num_experts - 1);
  });
  return key;
}

py::dict layer_to_dict(const ExpertStore& store, LayerIdx layer) {
  const StoredLayer& stored = store.layer(layer);
  py::dict out;
  out["name"] = stored.name;
  out["num_experts"] = stored.num_experts;
  out["dtype"] = dtype_name(stored.layout.dtype);
  out["hidden"] = stored.layout.hidden;
  out["intermediate"] = stored.layout.intermediate;
  out["gated"] = stored.layout.gated;
  out["has_bias"] = stored.layout.has_bias;
  out["slot_bytes"] = store.slot_bytes(layer);
  out["expert_bytes"] = stored.layout.bytes();
  return out;
}

StoredLayer layer_from_dict(const py::dict& fields) {
  return {.name = field<std::string>(fields, "name"),
          .num_experts = field<std::int32_t>(fields, "num_experts"),
          .layout = {.dtype = parse_dtype(field<std::string>(fields, "dtype")),
                     .hidden = field<std::int64_t>(fields, "hidden"),
                     .intermediate = field<std::int64_t>(fields, "intermediate"),
                     .gated = field<bool>(fields, "gated"),
                     .has_bias = field<bool>(fields, "has_bias")}};
}

void bind_store(py::module_& m) {
  m.def("parse_size", &size_to_tuple, py::arg("text"),
        R"(("bytes", n) or ("share", 0.25) of "6GiB", "6GB", "25%", 123.)");
  m.def(
      "fingerprint_files",
      [](const std::vector<std::string>& paths) { return fingerprint_files(paths); },
      py::arg("paths"), WithoutGil());
  m.def("file_identity", &file_identity, py::arg("fd"), py::arg("path"));
  m.def("read_safetensors_header", &header_to_dict, py::arg("path"));

  // Attributes may be added: what adopted memory belongs to is kept alive by the store over it.
  py::class_<StoreHandle>(m, "Store", py::dynamic_attr(), "Expert bytes at rest (immutable).")
      .def_property_readonly("num_layers",
                             [](const StoreHandle& s) { return s.store->num_layers(); })
      .def(
          "layer",
          [](const StoreHandle& s, std::int32_t layer) {
            return layer_to_dict(*s.store, checked_key(*s.store, layer, 0).layer);
          },
          py::arg("layer"))
      .def_property_readonly("total_slot_bytes",
                             [](const StoreHandle& s) { return s.store->total_slot_bytes(); })
      .def_property_readonly("adopted_bytes",
                             [](const StoreHandle& s) { return s.store->adopted_bytes(); })
      .def_property_readonly("description",
                             [](const StoreHandle& s) { return s.store->description(); })
      .def("read_expert_into", &expert_into, py::arg("layer"), py::arg("expert"),
           py::arg("address"), py::arg("nbytes"), WithoutGil());

  py::class_<Builder>(m, "StoreBuilder", "Collects files, layers and pieces.")
      .def(py::init<std::size_t, const std::string&, bool, std::uint64_t>(), py::kw_only(),
           py::arg("chunk_bytes") = kMiB, py::arg("verify") = "first", py::arg("direct") = true,
           py::arg("read_rate") = 0)
      .def("add_file", &Builder::add_file, py::arg("path"), py::arg("identity") = "")
      .def("add_layer", &Builder::add_layer, py::arg("name"), py::arg("num_experts"),
           py::arg("dtype"), py::arg("hidden"), py::arg("intermediate"), py::arg("gated"),
           py::arg("has_bias"))
      .def("add_piece", &Builder::add_piece, py::arg("layer"), py::arg("expert"),
           py::arg("section"), py::kw_only(), py::arg("file") = -1, py::arg("offset"),
           py::arg("nbytes"), py::arg("section_offset") = 0, py::arg("transform") = "copy",
           py::arg("rows") = 0, py::arg("columns") = 0, py::arg("dtype") = "F32")
      .def("build", &Builder::build, py::arg("description") = "experts", WithoutGil());
}

}  // namespace sluice::bindings
