#pragma once

#include <sys/types.h>

#include <cstddef>
#include <cstdint>

namespace sluice {

/// The system calls through which the store reads, writes and locks data: the seam where tests
/// plant a disk that fails, shortens reads, tears writes or is full. The product never changes it.
struct FileCalls {
  ssize_t (*pread)(int fd, void* target, std::size_t bytes, off_t offset);
  ssize_t (*pwrite)(int fd, const void* source, std::size_t bytes, off_t offset);
  int (*fdatasync)(int fd);
  int (*flock)(int fd, int operation);
  /// Bytes that an unprivileged writer may still put on the file system of `fd`.
  std::uint64_t (*free_bytes)(int fd);
};

/// The table in use. Change it only while no file of the store is being read or written.
[[nodiscard]] FileCalls& file_calls() noexcept;

}  // namespace sluice
