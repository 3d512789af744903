#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <utility>

namespace sluice {

/// A file descriptor that closes itself. Move-only.
class FileDescriptor {
 public:
  FileDescriptor() = default;
  explicit FileDescriptor(int fd) noexcept : fd_(fd) {}
  FileDescriptor(FileDescriptor&& other) noexcept : fd_(std::exchange(other.fd_, -1)) {}
  FileDescriptor& operator=(FileDescriptor&& other) noexcept {
    std::swap(fd_, other.fd_);
    return *this;
  }
  ~FileDescriptor();
  [[nodiscard]] int get() const noexcept { return fd_; }
  [[nodiscard]] explicit operator bool() const noexcept { return fd_ >= 0; }

 private:
  int fd_ = -1;
};

/// A regular file open for reading, by a buffered descriptor and, where the file system allows, an
/// O_DIRECT one. Move-only; closes itself.
///
/// Thread safety: reading is, by pread.
class ReadFile {
 public:
  /// Errors: IoError naming path and errno, also for a folder or a device.
  explicit ReadFile(const std::string& path, bool direct = true);

  [[nodiscard]] const std::string& path() const noexcept { return path_; }
  /// Its size when it was opened.
  [[nodiscard]] std::uint64_t bytes() const noexcept { return bytes_; }
  /// `file_identity` when it was opened.
  [[nodiscard]] const std::string& identity() const noexcept { return identity_; }
  [[nodiscard]] bool is_direct() const noexcept { return static_cast<bool>(direct_); }

  /// What reads cost; grows also when one throws.
  struct Cost {
    std::uint64_t bytes = 0;     ///< given by the kernel, asked twice or not
    std::uint64_t buffered = 0;  ///< reads for which O_DIRECT was asked for and refused
    std::uint64_t retries = 0;
  };

  /// Reads `bytes` from `offset` into `target`, all three multiples of 4096, by O_DIRECT; buffered
  /// with POSIX_FADV_DONTNEED behind it where that is refused; plainly buffered when the file was
  /// opened with `direct = false`. A read that meets the end of the file is whole as soon as it
  /// holds `needed` bytes; a shorter one is asked for the rest once more, then IoError.
  void read_aligned(std::uint64_t offset, std::size_t bytes, std::size_t needed, std::byte* target,
                    Cost& cost) const;
  /// Buffered, for headers. Errors: IoError on a short read.
  void read_exact(std::uint64_t offset, std::size_t bytes, std::byte* target) const;

 private:
  std::string path_;
  std::uint64_t bytes_ = 0;
  std::string identity_;
  bool direct_wanted_ = true;
  FileDescriptor buffered_;
  FileDescriptor direct_;
};

/// Device, inode, size and time of change of an open file: whether a path was given another file or
/// other bytes since. Errors: IoError naming `path`.
[[nodiscard]] std::string file_identity(int fd, const std::string& path);

/// Writes all of `bytes` at `offset`, whatever the system calls make of it.
/// Errors: IoError with `path`, offset and errno; what to do is said when the disk is full.
void write_exact(int fd, const std::string& path, std::uint64_t offset,
                 std::span<const std::byte> bytes);

/// Reads up to `bytes` from `offset` until the end of the file; returns how many there were.
/// Errors: IoError.
[[nodiscard]] std::size_t read_up_to(int fd, const std::string& path, std::uint64_t offset,
                                     std::size_t bytes, std::byte* target);

}  // namespace sluice
