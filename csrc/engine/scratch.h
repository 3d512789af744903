#pragma once

#include <cstddef>
#include <cstdint>
#include <new>

#include "base/bytes.h"

namespace sluice {

/// Working memory that grows and is kept: 64-byte aligned, contents lost on growth. Pinned:
/// pointers into it are handed out.
class Scratch {
 public:
  Scratch() = default;
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  ~Scratch() { free(); }

  /// At least `count` values of T; the next `reserve` may move them.
  template <class T>
  T* reserve(std::int64_t count) {
    const std::size_t bytes = static_cast<std::size_t>(count) * sizeof(T);
    if (bytes > bytes_) {
      free();
      data_ = ::operator new(bytes, std::align_val_t{kSlotAlignment});
      bytes_ = bytes;
    }
    return static_cast<T*>(data_);
  }
  [[nodiscard]] std::uint64_t bytes() const { return bytes_; }
  void free() noexcept {
    if (data_ != nullptr) ::operator delete(data_, std::align_val_t{kSlotAlignment});
    data_ = nullptr;
    bytes_ = 0;
  }

 private:
  void* data_ = nullptr;
  std::size_t bytes_ = 0;
};

}  // namespace sluice
