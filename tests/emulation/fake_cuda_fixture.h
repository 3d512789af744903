#pragma once

#include <gtest/gtest.h>

#include <cstddef>
#include <string>
#include <vector>

#include "tests/emulation/fake_cuda.h"
#include "tests/emulation/simt.h"

namespace fake {

inline testing::AssertionResult succeeded(const char* call, cudaError_t code) {
  if (code == cudaSuccess) return testing::AssertionSuccess();
  return testing::AssertionFailure()
         << call << ": got " << cudaGetErrorName(code) << ": " << last_failure();
}
/// The call succeeded.
#define EXPECT_CUDA(call) EXPECT_PRED_FORMAT1(::fake::succeeded, call)

struct Refused {
  cudaError_t expected;
  const char* part;
  testing::AssertionResult operator()(const char* call, cudaError_t code) const {
    if (code == expected && last_failure().find(part) != std::string::npos) {
      return testing::AssertionSuccess();
    }
    return testing::AssertionFailure()
           << call << ": got " << cudaGetErrorName(code) << " and \"" << last_failure()
           << "\", expected " << cudaGetErrorName(expected) << " and \"" << part << "\"";
  }
};
/// The call failed with `code`, and what it said contains `part`.
#define EXPECT_REFUSED(call, code, part) EXPECT_PRED_FORMAT1((::fake::Refused{code, part}), call)

inline const char* to_string(Policy policy) {
  static constexpr const char* kNames[] = {"eager", "lazy", "ahead", "random"};
  return kNames[static_cast<int>(policy)];
}

/// A fresh runtime for each test. A test that does what CUDA lets pass and we do not says so by
/// taking the findings.
class FakeCuda : public testing::Test {
 protected:
  void SetUp() override { start({}); }
  void TearDown() override {
    for (const std::string& finding : findings()) {
      if (!findings_taken_) ADD_FAILURE() << "finding: " << finding;
    }
    if (options().baton) reset({});
  }

  static void start(const Options& options) {
    reset(options);
    simt::options() = {.seed = options.seed};
  }

  std::string take_finding() {
    findings_taken_ = true;
    return findings().empty() ? "" : findings().back();
  }

  static float* device(int count) {
    void* memory = nullptr;
    EXPECT_CUDA(cudaMalloc(&memory, static_cast<std::size_t>(count) * sizeof(float)));
    return static_cast<float*>(memory);
  }
  /// Pinned, every element `value`.
  static float* pinned(int count, float value) {
    void* memory = nullptr;
    EXPECT_CUDA(cudaHostAlloc(&memory, static_cast<std::size_t>(count) * sizeof(float), 0));
    auto* const floats = static_cast<float*>(memory);
    for (int i = 0; i < count && floats != nullptr; ++i) floats[i] = value;
    return floats;
  }
  static cudaStream_t stream(unsigned flags = cudaStreamNonBlocking) {
    cudaStream_t made = nullptr;
    EXPECT_CUDA(cudaStreamCreateWithFlags(&made, flags));
    return made;
  }
  static cudaEvent_t event(unsigned flags = cudaEventDisableTiming) {
    cudaEvent_t made = nullptr;
    EXPECT_CUDA(cudaEventCreateWithFlags(&made, flags));
    return made;
  }
  static void copy(float* to, const float* from, int count, cudaStream_t stream) {
    EXPECT_CUDA(cudaMemcpyAsync(to, from, static_cast<std::size_t>(count) * sizeof(float),
                                cudaMemcpyDefault, stream));
  }

 private:
  bool findings_taken_ = false;
};

}  // namespace fake
