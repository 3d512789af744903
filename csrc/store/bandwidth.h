#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <string>

namespace sluice {

/// A range of a file.
struct FileExtent {
  std::uint64_t offset = 0;
  std::uint64_t bytes = 0;
};

/// Bytes per second that the disk gives when `threads` threads read these ranges by O_DIRECT, in
/// order, in reads of `chunk_bytes` and nothing else: the denominator of every other rate. Ranges
/// are widened to whole blocks of 4096; the bytes of the widened reads are what is counted.
/// Errors: IoError, also when the file system refuses O_DIRECT (a page cache is no disk);
/// ConfigError on sizes that cannot work.
[[nodiscard]] double disk_bandwidth(const std::string& path, std::span<const FileExtent> extents,
                                    std::size_t chunk_bytes, int threads);
[[nodiscard]] double disk_bandwidth(const std::string& path, std::uint64_t offset,
                                    std::uint64_t bytes, std::size_t chunk_bytes, int threads);

}  // namespace sluice
