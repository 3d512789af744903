#include <string>

#include "base/error.h"
#include "device/device.h"
#include "device/nvtx.h"

namespace sluice {

std::unique_ptr<Device> make_cuda_device(int ordinal) {
  throw DeviceError("device cuda:" + std::to_string(ordinal) +
                    ": got a build without CUDA, expected one with it; keep the model on the CPU, "
                    "or build sluice where nvcc is found");
}

CudaDeviceFacts cuda_device_facts(int ordinal) {
  throw DeviceError("device cuda:" + std::to_string(ordinal) +
                    ": got a build without CUDA, expected one with it; build sluice where nvcc is "
                    "found");
}

int num_cuda_devices() noexcept { return 0; }

std::unique_ptr<Ranges> make_nvtx_ranges() {
  throw ConfigError(
      "SLUICE_NVTX: got 1 in a build without CUDA, expected one with it; build sluice where nvcc "
      "is "
      "found, or unset it");
}

}  // namespace sluice
