#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <string>

#include "base/parallel.h"

namespace sluice::bindings {

// The read loops that doctor and the benchmarks hold sluice's rates against.

/// Bytes/s of summing `memory` `repeats` times, by AVX-512 where this machine has it.
[[nodiscard]] double read_bandwidth(std::span<const std::byte> memory, int repeats,
                                    ParallelFor& parallel);

/// Bytes/s of reading a file range by O_DIRECT in chunks, `num_threads` deep; buffered, evicting
/// what it read, where the file system refuses O_DIRECT. Errors: ConfigError on a range outside of
/// the file, IoError.
[[nodiscard]] double disk_bandwidth(const std::string& path, std::uint64_t offset,
                                    std::uint64_t nbytes, std::size_t chunk_bytes, int num_threads);

}  // namespace sluice::bindings
