#pragma once

#include <cstddef>

#include "base/parallel.h"

namespace sluice {

/// Bytes per second of the fastest of `repeats` passes of a plain read loop over [data, data +
/// bytes), cut over the threads of `parallel`: what a memory-bound kernel is measured against. The
/// data should be larger than the last cache by a factor of four, and written once before.
[[nodiscard]] double read_bandwidth(const void* data, std::size_t bytes, int repeats,
                                    ParallelFor& parallel);

}  // namespace sluice
