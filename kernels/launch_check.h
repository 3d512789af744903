#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <string>

#include "base/error.h"
#include "base/stream.h"

// What every launcher does around kernels/launch.h.

namespace sluice {

[[nodiscard]] inline cudaStream_t to_cuda(StreamHandle stream) {
  return reinterpret_cast<cudaStream_t>(static_cast<std::uintptr_t>(stream));
}

/// Errors: DeviceError naming the kernel and the runtime's error.
inline void check_launch(const char* kernel, cudaError_t error) {
  if (error == cudaSuccess) [[likely]]
    return;
  throw DeviceError(std::string("launch of ") + kernel + ": got " + cudaGetErrorName(error) + " (" +
                    cudaGetErrorString(error) + "), expected cudaSuccess");
}

/// Errors: ConfigError unless `pointer` is 16-byte aligned.
inline void check_aligned(const char* kernel, const char* what, const void* pointer) {
  require<ConfigError>(reinterpret_cast<std::uintptr_t>(pointer) % 16 == 0, [&] {
    return std::string(kernel) + ": got " + what + " at an address that is " +
           std::to_string(reinterpret_cast<std::uintptr_t>(pointer) % 16) +
           " bytes past a multiple of 16, expected it aligned; pass a contiguous tensor";
  });
}

}  // namespace sluice
