#pragma once

#include <cstddef>

namespace sluice {

/// What plans of CUDA kernels ask of a GPU: plain values, so that plans are tested without one.
struct GpuTraits {
  int num_multiprocessors = 1;
  /// The most that one block may opt into (cudaDevAttrMaxSharedMemoryPerBlockOptin).
  std::size_t shared_bytes_per_block = 99 * 1024;

  /// Shared memory of one multiprocessor. On every architecture from sm_80 on it is the largest
  /// block's and the 1 KiB that the system keeps per block (CUDA C++ programming guide, technical
  /// specifications per compute capability).
  [[nodiscard]] constexpr std::size_t shared_bytes_per_multiprocessor() const noexcept {
    return shared_bytes_per_block + kReservedSharedBytes;
  }
  static constexpr std::size_t kReservedSharedBytes = 1024;
};

}  // namespace sluice
