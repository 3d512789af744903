#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

namespace sluice {

/// A file open for reading, by a buffered descriptor and, where the file system allows, an
/// O_DIRECT one. Move-only; closes itself.
///
/// Thread safety: reading is, by pread.
class ReadFile {
 public:
  /// Errors: IoError naming path and errno.
  explicit ReadFile(const std::string& path, bool direct = true);
  ReadFile(ReadFile&& other) noexcept;
  ReadFile& operator=(ReadFile&& other) noexcept;
  ~ReadFile();

  [[nodiscard]] const std::string& path() const noexcept { return path_; }
  [[nodiscard]] std::uint64_t bytes() const noexcept { return bytes_; }
  [[nodiscard]] bool is_direct() const noexcept { return direct_fd_ >= 0; }

  /// What one read cost.
  struct Result {
    std::size_t bytes = 0;  ///< given by the kernel
    bool buffered = false;
    int retries = 0;
  };

  /// Reads `bytes` from `offset`, all three multiples of 4096, by O_DIRECT; buffered with
  /// POSIX_FADV_DONTNEED where that is not possible. A read that meets the end of the file is
  /// whole as soon as it holds `needed` bytes; a shorter one is asked for once more, then IoError.
  Result read_aligned(std::uint64_t offset, std::size_t bytes, std::size_t needed,
                      std::byte* target) const;
  /// Buffered, for headers. Errors: IoError on a short read.
  void read_exact(std::uint64_t offset, std::size_t bytes, std::byte* target) const;

 private:
  std::string path_;
  std::uint64_t bytes_ = 0;
  int buffered_fd_ = -1;
  int direct_fd_ = -1;
};

}  // namespace sluice
