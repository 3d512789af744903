#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <random>
#include <vector>

#include "base/dtype.h"
#include "kernels/cpu_isa.h"

namespace sluice::testing {

/// The tiers of this machine, the definition first.
inline std::vector<CpuIsa> tiers() {
  std::vector<CpuIsa> found;
  for (const CpuIsa isa : kCpuIsas) {
    if (cpu_supports(isa)) found.push_back(isa);
  }
  return found;
}

/// Random elements of a type at an address that is `offset` bytes past a multiple of 64, with
/// nothing of ours behind them: the address sanitizer sees an overrun.
class Elements {
 public:
  Elements(DType dtype, std::int64_t count, std::size_t offset, std::mt19937& random)
      : dtype_(dtype), count_(count), values_(static_cast<std::size_t>(count)) {
    const std::size_t bytes = values_.size() * element_bytes(dtype);
    memory_.reset(static_cast<std::byte*>(::operator new(bytes + offset, std::align_val_t{64})));
    data_ = memory_.get() + offset;
    std::normal_distribution<float> normal;
    for (std::size_t i = 0; i < values_.size(); ++i) set(i, normal(random));
  }

  void set(std::size_t i, float value) {
    dispatch_dtype(dtype_, [&](auto tag) {
      using T = typename decltype(tag)::type;
      const T element = from_float<T>(value);
      reinterpret_cast<T*>(data_)[i] = element;
      values_[i] = to_float(element);
    });
  }

  [[nodiscard]] const void* data() const { return data_; }
  [[nodiscard]] const float* floats() const { return reinterpret_cast<const float*>(data_); }
  [[nodiscard]] std::int64_t count() const { return count_; }
  /// What the elements are worth, exactly.
  [[nodiscard]] const std::vector<float>& values() const { return values_; }

 private:
  struct Free {
    void operator()(std::byte* memory) const { ::operator delete(memory, std::align_val_t{64}); }
  };
  DType dtype_;
  std::int64_t count_;
  std::vector<float> values_;
  std::unique_ptr<std::byte, Free> memory_;
  std::byte* data_ = nullptr;
};

}  // namespace sluice::testing
