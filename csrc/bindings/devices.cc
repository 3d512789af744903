#include "bindings/devices.h"

#include <charconv>
#include <string_view>

#include "base/error.h"
#include "engine/cuda_compute.h"

namespace sluice::bindings {

EngineDevice open_device(const std::string& torch_device) {
  if (torch_device == "cpu") return {.device = make_host_device(), .compute = nullptr};
  constexpr std::string_view kCuda = "cuda:";
  int ordinal = -1;
  const std::string_view name = torch_device;
  if (name.starts_with(kCuda)) {
    const auto [end, code] =
        std::from_chars(name.data() + kCuda.size(), name.data() + name.size(), ordinal);
    if (code != std::errc() || end != name.data() + name.size()) ordinal = -1;
  }
  require<ConfigError>(ordinal >= 0, [&] {
    return "device: got \"" + torch_device + "\", expected \"cpu\" or \"cuda:N\"";
  });
  EngineDevice opened{.device = make_cuda_device(ordinal), .compute = nullptr};
  opened.compute = make_cuda_compute(*opened.device);
  return opened;
}

void bind_devices(pybind11::module_& m) {
  m.def("num_cuda_devices", &num_cuda_devices);
  m.def("has_slots_apart", &has_slots_apart, pybind11::arg("device"));
}

const char* cuda_kind() noexcept {
#if SLUICE_CUDA_ENABLED
  return "runtime";
#else
  return "none";
#endif
}

bool has_slots_apart(const std::string& torch_device) noexcept { return torch_device != "cpu"; }

void forward_tensors(Engine& engine, const ForwardArgs& args) { engine.forward(args); }

int call_on_tensors(std::size_t /*in_bytes*/, std::size_t /*out_bytes*/, const void* in, void* out,
                    const std::function<int(const void* in, void* out)>& call) {
  return call(in, out);
}

}  // namespace sluice::bindings
