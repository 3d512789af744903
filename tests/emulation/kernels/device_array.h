#pragma once

#include <cuda_runtime_api.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>
#include <vector>

#include "base/dtype.h"
#include "base/stream.h"
#include "tests/emulation/fake_cuda.h"
#include "tests/emulation/sanitized.h"
#include "tests/emulation/simt.h"

namespace sluice::testing {

/// Elements of a type in device memory of their own: a byte past either end faults. Freed with the
/// object, or by `fake::reset`.
template <class T>
class DeviceArray {
 public:
  /// Undefined: a kernel that reads an element before it is written is reported, or reads NaN.
  explicit DeviceArray(std::size_t count) : count_(count) {
    void* data = nullptr;
    const cudaError_t error = cudaMalloc(&data, bytes() > 0 ? bytes() : 16);
    if (error != cudaSuccess) throw std::runtime_error("cudaMalloc: " + fake::last_failure());
    data_ = static_cast<T*>(data);
  }
  explicit DeviceArray(const std::vector<T>& values) : DeviceArray(values.size()) { write(values); }
  DeviceArray(DeviceArray&& other) noexcept : data_(other.data_), count_(other.count_) {
    other.data_ = nullptr;
  }
  DeviceArray& operator=(DeviceArray&&) = delete;
  ~DeviceArray() {
    if (data_ != nullptr) (void)cudaFree(data_);
  }

  [[nodiscard]] T* data() const { return data_; }
  [[nodiscard]] std::size_t size() const { return count_; }

  /// Between launches, as a copy that has ended.
  void write(const std::vector<T>& values) {
    ASSERT_EQ(cudaDeviceSynchronize(), cudaSuccess) << fake::last_failure();
    if (values.empty()) return;
    const fake::Peek peek;
    std::memcpy(static_cast<void*>(data_), values.data(), bytes());
    simt::mark_defined(data_, bytes());
  }
  /// Waits for the device. An element that no kernel wrote is all ones.
  [[nodiscard]] std::vector<T> read() const {
    const cudaError_t error = cudaDeviceSynchronize();
    if (error != cudaSuccess) throw std::runtime_error("device: " + fake::last_failure());
    std::vector<T> values(count_);
    if (count_ == 0) return values;
    const fake::Peek peek;
    std::memcpy(static_cast<void*>(values.data()), data_, bytes());
    return values;
  }

 private:
  [[nodiscard]] std::size_t bytes() const { return count_ * sizeof(T); }
  T* data_ = nullptr;
  std::size_t count_ = 0;
};

/// Values in a type's own bytes.
[[nodiscard]] inline std::vector<std::byte> encode(DType dtype, const std::vector<float>& values) {
  std::vector<std::byte> bytes(values.size() * element_bytes(dtype));
  dispatch_dtype(dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    for (std::size_t i = 0; i < values.size(); ++i) {
      const T element = from_float<T>(values[i]);
      std::memcpy(bytes.data() + i * sizeof(T), &element, sizeof(T));
    }
  });
  return bytes;
}
[[nodiscard]] inline std::vector<float> decode(DType dtype, const std::vector<std::byte>& bytes) {
  std::vector<float> values(bytes.size() / element_bytes(dtype));
  dispatch_dtype(dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    for (std::size_t i = 0; i < values.size(); ++i) {
      T element;
      std::memcpy(&element, bytes.data() + i * sizeof(T), sizeof(T));
      values[i] = to_float(element);
    }
  });
  return values;
}

/// How a test runs: which thread, which stream, which sum of an mma comes first. Setting one up
/// resets the device: arrays come after it.
struct Schedule {
  simt::Order order = simt::Order::kForward;
  fake::Policy policy = fake::Policy::kRandom;
  std::uint64_t seed = 1;
  simt::MmaModel mma = simt::MmaModel::kFp32InOrder;

  void set_up() const {
    simt::options() = {.order = order, .seed = seed, .mma = mma};
    fake::reset({.policy = policy, .seed = seed});
  }
  [[nodiscard]] std::string text() const {
    return "order " + std::to_string(static_cast<int>(order)) + ", policy " +
           std::to_string(static_cast<int>(policy)) + ", seed " + std::to_string(seed) +
           ", mma model " + std::to_string(static_cast<int>(mma));
  }
};

inline constexpr simt::Order kOrders[] = {simt::Order::kForward, simt::Order::kReverse,
                                          simt::Order::kRandom, simt::Order::kSkew};
inline constexpr fake::Policy kPolicies[] = {fake::Policy::kEager, fake::Policy::kLazy,
                                             fake::Policy::kAhead, fake::Policy::kRandom};

/// The first `most` of the models of an mma's sum, or one with a sanitizer.
[[nodiscard]] inline std::vector<simt::MmaModel> mma_models(std::size_t most = 3) {
  std::vector<simt::MmaModel> models = {simt::MmaModel::kFp32InOrder, simt::MmaModel::kFp64PerEight,
                                        simt::MmaModel::kFp64PerEightTruncated};
  models.resize(kSanitized ? 1 : most);
  return models;
}

/// The i-th of a sweep: every pair of order and policy comes up, every seed is another.
[[nodiscard]] inline Schedule schedule(std::size_t i) {
  return {.order = kOrders[i % 4], .policy = kPolicies[i / 4 % 4], .seed = i + 1};
}

/// Rounds of the random sweeps, each with seeds of its own: 1, more in the long run
/// (SLUICE_TEST_SEEDS).
[[nodiscard]] inline int num_seeds() {
  const char* const seeds = std::getenv("SLUICE_TEST_SEEDS");
  return seeds == nullptr ? 1 : std::max(1, std::atoi(seeds));
}

/// The text of the error that `fn` must throw.
template <class E, class Fn>
[[nodiscard]] std::string refusal(Fn fn) {
  try {
    fn();
  } catch (const E& error) {
    return error.what();
  }
  return "nothing was thrown";
}

/// 0, torch's stream where the user chose none, or a stream of the user's.
class Stream {
 public:
  explicit Stream(bool own) {
    if (own) (void)cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking);
  }
  ~Stream() {
    if (stream_ != nullptr) (void)cudaStreamDestroy(stream_);
  }
  Stream(const Stream&) = delete;
  Stream& operator=(const Stream&) = delete;
  [[nodiscard]] StreamHandle handle() const {
    return StreamHandle{reinterpret_cast<std::uintptr_t>(stream_)};
  }
  [[nodiscard]] cudaStream_t cuda() const { return stream_; }

 private:
  cudaStream_t stream_ = nullptr;
};

}  // namespace sluice::testing
