#include "base/error.h"
#include "bindings/device_rates.h"

namespace sluice::bindings {

DeviceRates measure_device(Device& /*device*/, ParallelFor& /*parallel*/,
                           const DeviceProbe& /*probe*/) {
  throw DeviceError(
      "measure_device: got a build without CUDA, expected one with it; build sluice where nvcc is "
      "found");
}

}  // namespace sluice::bindings
