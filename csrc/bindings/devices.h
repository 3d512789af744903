#pragma once

#include <pybind11/pybind11.h>

#include <cstddef>
#include <functional>
#include <memory>
#include <string>

#include "engine/engine.h"

// Which device an engine works on, and how calls of a torch device reach it. On a build for the
// emulation of the tests another file takes the place of devices.cc: there the CPU's tensors stand
// for those of a GPU.

namespace sluice::bindings {

/// A device with the arithmetic for it; null: the host's.
struct EngineDevice {
  std::unique_ptr<Device> device;
  std::unique_ptr<ExpertCompute> compute;
};

/// `torch_device`: "cpu" or "cuda:N".
/// Errors: ConfigError for another name; DeviceError for a CUDA device that this build, or this
/// machine, lacks.
[[nodiscard]] EngineDevice open_device(const std::string& torch_device);

/// What of this Python sees.
void bind_devices(pybind11::module_& m);

/// "none", "runtime", or "emulated": what CUDA means in this build.
[[nodiscard]] const char* cuda_kind() noexcept;
/// Whether slots of `torch_device` are memory apart from the host's.
[[nodiscard]] bool has_slots_apart(const std::string& torch_device) noexcept;

/// A forward on tensors of the torch device.
void forward_tensors(Engine& engine, const ForwardArgs& args);

/// A callback of a forward: `call(in, out)` on matrices that torch's device can read and write.
int call_on_tensors(std::size_t in_bytes, std::size_t out_bytes, const void* in, void* out,
                    const std::function<int(const void* in, void* out)>& call);

}  // namespace sluice::bindings
