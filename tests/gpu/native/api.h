#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <string>
#include <utility>

// What the library of the tests on a GPU is made of. It is linked against the real runtime for a
// GPU and against the fake one without: the same text runs in both. Python calls it by ctypes.

#if defined(SLUICE_EMULATE)
#include "tests/emulation/fake_cuda.h"
#endif

#define SLUICE_GPU_API extern "C" __attribute__((visibility("default")))

namespace gpu_tests {

/// What Python gets: null where all went well, else a text that lives until the thread's next one.
inline const char* told(std::string text) {
  thread_local std::string kept;
  kept = std::move(text);
  return kept.empty() ? nullptr : kept.c_str();
}

/// A runtime's answer that was not the expected one, as the exception of this library.
struct Failed {
  std::string text;
};

inline std::string named(cudaError_t code) { return cudaGetErrorName(code); }

inline void expect(const std::string& what, cudaError_t got, cudaError_t expected = cudaSuccess) {
  if (got == expected) return;
  std::string text = what + ": got " + named(got) + ", expected " + named(expected);
#if defined(SLUICE_EMULATE)
  text += "; " + fake::last_failure();
#endif
  throw Failed{std::move(text)};
}
inline void expect(const std::string& what, bool holds) {
  if (!holds) throw Failed{what};
}

/// Memory of the device, or pinned memory of the host; a lost device keeps it.
class Buffer {
 public:
  enum class Kind { kDevice, kPinned };
  explicit Buffer(std::size_t bytes, Kind kind = Kind::kDevice) : kind_(kind) {
    expect("allocation",
           kind == Kind::kDevice ? cudaMalloc(&data_, bytes) : cudaHostAlloc(&data_, bytes, 0));
  }
  ~Buffer() {
    if (data_ != nullptr) (void)(kind_ == Kind::kDevice ? cudaFree(data_) : cudaFreeHost(data_));
  }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  template <class T>
  [[nodiscard]] T* as() const {
    return static_cast<T*>(data_);
  }
  /// Gives it back now.
  [[nodiscard]] cudaError_t free() {
    void* const data = std::exchange(data_, nullptr);
    return kind_ == Kind::kDevice ? cudaFree(data) : cudaFreeHost(data);
  }

 private:
  Kind kind_;
  void* data_ = nullptr;
};

class Stream {
 public:
  explicit Stream(unsigned flags = cudaStreamNonBlocking) {
    expect("cudaStreamCreateWithFlags", cudaStreamCreateWithFlags(&stream_, flags));
  }
  ~Stream() {
    if (stream_ != nullptr) (void)cudaStreamDestroy(stream_);
  }
  Stream(const Stream&) = delete;
  Stream& operator=(const Stream&) = delete;
  operator cudaStream_t() const { return stream_; }  // NOLINT(google-explicit-constructor)
  [[nodiscard]] cudaError_t destroy() { return cudaStreamDestroy(std::exchange(stream_, nullptr)); }

 private:
  cudaStream_t stream_ = nullptr;
};

class Event {
 public:
  Event() {
    expect("cudaEventCreateWithFlags", cudaEventCreateWithFlags(&event_, cudaEventDisableTiming));
  }
  ~Event() { (void)cudaEventDestroy(event_); }
  Event(const Event&) = delete;
  Event& operator=(const Event&) = delete;
  operator cudaEvent_t() const { return event_; }  // NOLINT(google-explicit-constructor)

 private:
  cudaEvent_t event_ = nullptr;
};

}  // namespace gpu_tests
