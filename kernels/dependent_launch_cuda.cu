#include "kernels/dependent_launch.h"
#include "kernels/launch.h"
#include "kernels/launch_check.h"

namespace sluice {
namespace {

// Compiled for the same architectures as every other kernel of the library; never launched.
__global__ void probe_kernel() {}

constexpr int kFirstVersion = 90;

}  // namespace

bool supports_dependent_launch() {
  cudaFuncAttributes attributes = {};
  check_launch("probe",
               cudaFuncGetAttributes(&attributes, reinterpret_cast<const void*>(&probe_kernel)));
  return attributes.binaryVersion >= kFirstVersion && attributes.ptxVersion >= kFirstVersion;
}

}  // namespace sluice
