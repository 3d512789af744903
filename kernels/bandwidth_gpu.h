#pragma once

#include <cstddef>
#include <cstdint>

#include "base/stream.h"
#include "kernels/gpu_traits.h"

namespace sluice {

/// Words that `launch_read_bandwidth` writes: one per block.
[[nodiscard]] int read_bandwidth_blocks(const GpuTraits& gpu);

/// Reads [data, data + bytes) once, 16 bytes per load, past the L1 cache: what a memory-bound
/// kernel is measured against (time it between two events). sums[b] is block b's sum of the 32-bit
/// words it read, modulo 2^32, so that nothing of the reading can be left out.
///
/// Shapes: sums [read_bandwidth_blocks(gpu)].
/// Errors: ConfigError when `data` or `bytes` is no multiple of 16; DeviceError naming the kernel.
void launch_read_bandwidth(const void* data, std::size_t bytes, std::uint32_t* sums,
                           const GpuTraits& gpu, StreamHandle stream);

/// Starts a kernel that does nothing: what a launch takes besides its work.
///
/// Errors: DeviceError naming the kernel.
void launch_nothing(StreamHandle stream);

}  // namespace sluice
