#pragma once

// For tests of the SIMT core itself: memory with guards and a launch without a runtime.

#include <sys/mman.h>

#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <string>
#include <tuple>
#include <utility>

#include "tests/emulation/simt.h"

namespace simt::testing {

/// `count` elements of device or pinned memory that end where a guard begins. Undefined at first;
/// the host may always look.
template <class T>
class Array {
 public:
  explicit Array(std::size_t count, const char* tag = "array",
                 RegionKind kind = RegionKind::kDevice)
      : count_(count) {
    const std::size_t bytes = (count * sizeof(T) + 15) / 16 * 16;
    const std::size_t usable = (bytes + kPage - 1) / kPage * kPage;
    mapped_ = usable + 2 * kGuard;
    base_ = static_cast<char*>(
        mmap(nullptr, mapped_, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
    if (base_ == MAP_FAILED || mprotect(base_ + kGuard, usable, PROT_READ | PROT_WRITE) != 0) {
      std::perror("simt::testing::Array");
      std::abort();
    }
    data_ = reinterpret_cast<T*>(base_ + kGuard + usable - bytes);
    add_region(data_, count * sizeof(T), kind, tag);
    poison(data_, count * sizeof(T));
  }
  ~Array() {
    release();
    remove_region(data_);
  }
  Array(const Array&) = delete;
  Array& operator=(const Array&) = delete;

  /// Unmaps it, as a free would; its addresses stay known.
  void free() {
    remove_region(data_);
    mprotect(base_, mapped_, PROT_NONE);
  }
  Array& fill(T value) {
    for (std::size_t i = 0; i < count_; ++i) data_[i] = value;
    mark_defined(data_, count_ * sizeof(T));
    return *this;
  }
  /// fill(i) = value(i).
  template <class Value>
  Array& generate(Value value) {
    for (std::size_t i = 0; i < count_; ++i) data_[i] = static_cast<T>(value(i));
    mark_defined(data_, count_ * sizeof(T));
    return *this;
  }
  [[nodiscard]] T* data() { return data_; }
  [[nodiscard]] std::size_t size() const { return count_; }
  [[nodiscard]] T& operator[](std::size_t i) { return data_[i]; }

 private:
  static constexpr std::size_t kPage = 4096;
  static constexpr std::size_t kGuard = std::size_t{16} << 20;

  void release() { munmap(base_, mapped_); }

  std::size_t count_;
  std::size_t mapped_ = 0;
  char* base_ = nullptr;
  T* data_ = nullptr;
};

struct Shape {
  dim3 grid = 1;
  dim3 block = 32;
  std::size_t shared_bytes = 0;
};

template <class... P>
struct Call {
  void (*kernel)(P...);
  std::tuple<P...> args;
};

// Uninstrumented: TSan would see threads enter it that never leave, when their grid fails.
template <class... P, std::size_t... I>
__attribute__((no_sanitize("thread"))) void run_call(const Call<P...>& call,
                                                     std::index_sequence<I...>) {
  call.kernel(std::get<I>(call.args)...);
}

template <class... P>
__attribute__((no_sanitize("thread"))) void run_packed(const void* args) {
  run_call(*static_cast<const Call<P...>*>(args), std::index_sequence_for<P...>{});
}

/// A grid of `kernel`, ready to step.
template <class... P, class... A>
std::unique_ptr<Grid> make_grid(const char* name, Shape shape, void (*kernel)(P...), A... args) {
  auto call = std::make_shared<const Call<P...>>(Call<P...>{kernel, std::tuple<P...>(args...)});
  return std::make_unique<Grid>(name, shape.grid, shape.block, shape.shared_bytes, run_packed<P...>,
                                std::move(call), sizeof(Call<P...>));
}

/// Steps it to the end. "" when it is done, its error, or "spins" or "waits for the previous grid".
inline std::string finish(Grid& grid) {
  while (true) {
    switch (grid.step()) {
      case Grid::Step::kProgress:
        break;
      case Grid::Step::kDone:
        return "";
      case Grid::Step::kFailed:
        return grid.error();
      case Grid::Step::kBlockedOnDependency:
        return "waits for the previous grid";
      case Grid::Step::kSpinning:
        return "spins";
    }
  }
}

template <class... P, class... A>
std::string run(const char* name, Shape shape, void (*kernel)(P...), A... args) {
  return finish(*make_grid(name, shape, kernel, args...));
}

inline constexpr Order kOrders[] = {Order::kForward, Order::kReverse, Order::kRandom, Order::kSkew};

inline const char* name_of(Order order) {
  switch (order) {
    case Order::kForward:
      return "forward";
    case Order::kReverse:
      return "reverse";
    case Order::kRandom:
      return "random";
    case Order::kSkew:
      return "skew";
  }
  return "";
}

/// Options for the length of a scope.
class With {
 public:
  explicit With(Options value) : before_(options()) { options() = value; }
  ~With() { options() = before_; }
  With(const With&) = delete;
  With& operator=(const With&) = delete;

 private:
  Options before_;
};

}  // namespace simt::testing
