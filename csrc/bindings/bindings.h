#pragma once

#include <pybind11/pybind11.h>

#include <memory>
#include <string>

#include "kernels/gate.h"
#include "store/expert_store.h"

namespace sluice::bindings {

namespace py = pybind11;

/// What Python holds as `_core.Store`: pybind11 has no holders of const objects.
struct StoreHandle {
  std::shared_ptr<const ExpertStore> store;
};

/// One function per topic; module.cc calls them all.
void bind_errors(py::module_& m);
void bind_store(py::module_& m);
void bind_pack(py::module_& m);
void bind_session(py::module_& m);
void bind_scorers(py::module_& m);
void bind_simulate(py::module_& m);
void bind_torch(py::module_& m);
void bind_kernels(py::module_& m);
void bind_device_bandwidth(py::module_& m);
/// `_core._cuda`, for tests and benchmarks alone; nothing in a build without CUDA.
void bind_cuda_kernels(py::module_& m);

/// The dict of `Store.layer`, and back. Errors: ConfigError naming the key.
[[nodiscard]] py::dict layer_to_dict(const ExpertStore& store, LayerIdx layer);
[[nodiscard]] StoredLayer layer_from_dict(const py::dict& fields);
/// The options that `StoreBuilder` and `open_pack` take.
[[nodiscard]] ExpertStore::Options store_options(std::size_t chunk_bytes, const std::string& verify,
                                                 bool direct, std::uint64_t read_rate);
/// Errors: ConfigError when the store has no such expert.
[[nodiscard]] ExpertKey checked_key(const ExpertStore& store, std::int64_t layer,
                                    std::int64_t expert);

/// `fields[key]`. Errors: ConfigError when it is missing or of another type.
template <class T>
[[nodiscard]] T field(const py::dict& fields, const char* key) {
  if (!fields.contains(key)) throw ConfigError(std::string(key) + ": missing");
  try {
    return fields[key].cast<T>();
  } catch (const py::cast_error&) {
    throw ConfigError(std::string(key) + ": got " + py::repr(fields[key]).cast<std::string>() +
                      ", expected another type");
  }
}

/// A gate's kind, interleaved, alpha and limit. Errors: ConfigError naming the key.
[[nodiscard]] inline GateSpec gate_from_dict(const py::dict& gate) {
  return {.kind = parse_gate(field<std::string>(gate, "kind")),
          .interleaved = field<bool>(gate, "interleaved"),
          .alpha = field<float>(gate, "alpha"),
          .limit = field<float>(gate, "limit")};
}

/// An address that Python passed. Errors: ConfigError on 0 where bytes are to be there.
[[nodiscard]] inline std::byte* address_of(std::uint64_t address, std::uint64_t bytes) {
  require<ConfigError>(address != 0 || bytes == 0,
                       [] { return "address: got 0, expected a tensor's data_ptr()"; });
  return reinterpret_cast<std::byte*>(address);
}

}  // namespace sluice::bindings
