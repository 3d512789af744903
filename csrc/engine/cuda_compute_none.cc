#include "base/error.h"
#include "engine/cuda_compute.h"

namespace sluice {

std::unique_ptr<ExpertCompute> make_cuda_compute(Device& /*device*/) {
  throw DeviceError(
      "CUDA kernels: got a build without CUDA, expected one with it; build sluice where nvcc is "
      "found");
}

}  // namespace sluice
