#pragma once

#include <cstddef>
#include <cstdlib>
#include <memory>
#include <new>

#include "base/bytes.h"

namespace sluice {

/// A 4096-aligned buffer. Move-only.
class AlignedBuffer {
 public:
  AlignedBuffer() = default;
  explicit AlignedBuffer(std::size_t bytes) : bytes_(align_up(bytes, kDirectAlignment)) {
    if (bytes_ == 0) return;
    data_.reset(static_cast<std::byte*>(std::aligned_alloc(kDirectAlignment, bytes_)));
    if (data_ == nullptr) throw std::bad_alloc();
  }
  [[nodiscard]] std::byte* data() const noexcept { return data_.get(); }
  [[nodiscard]] std::size_t bytes() const noexcept { return bytes_; }

 private:
  struct Free {
    void operator()(std::byte* data) const noexcept { std::free(data); }
  };
  std::unique_ptr<std::byte, Free> data_;
  std::size_t bytes_ = 0;
};

/// Working memory of one I/O thread: an aligned bounce buffer that grows to the largest chunk.
/// Made with `ExpertStore::largest_read_bytes()` it never allocates again.
class IoScratch {
 public:
  explicit IoScratch(std::size_t bytes = 0) : bounce_(bytes) {}
  /// At least `bytes` of 4096-aligned memory; what it held before is gone.
  [[nodiscard]] std::byte* reserve(std::size_t bytes) {
    if (bytes > bounce_.bytes()) bounce_ = AlignedBuffer(bytes);
    return bounce_.data();
  }
  [[nodiscard]] std::size_t bytes() const noexcept { return bounce_.bytes(); }

 private:
  AlignedBuffer bounce_;
};

}  // namespace sluice
