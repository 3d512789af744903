#pragma once

#include <cuda_runtime_api.h>
#include <gtest/gtest.h>

#include <cstring>
#include <memory>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "engine/cuda_compute.h"
#include "engine/engine.h"
#include "engine/model.h"
#include "tests/emulation/fake_cuda.h"
#include "tests/emulation/sanitized.h"
#include "tests/emulation/simt.h"

namespace sluice::testing {

/// One schedule of the emulation.
struct Schedule {
  simt::Order order = simt::Order::kForward;
  fake::Policy policy = fake::Policy::kRandom;
  std::uint64_t seed = 1;
  bool user_stream = false;
};

[[nodiscard]] inline std::string text(const Schedule& schedule) {
  return "order " + std::to_string(static_cast<int>(schedule.order)) + ", policy " +
         std::to_string(static_cast<int>(schedule.policy)) + ", seed " +
         std::to_string(schedule.seed) + (schedule.user_stream ? ", user's stream" : ", stream 0");
}

/// All orders × all policies, on both kinds of stream in turn; with a sanitizer every policy on
/// both streams, in every order.
[[nodiscard]] inline std::vector<Schedule> all_schedules(std::uint64_t seed = 1) {
  constexpr simt::Order kOrders[] = {simt::Order::kForward, simt::Order::kReverse,
                                     simt::Order::kRandom, simt::Order::kSkew};
  constexpr fake::Policy kPolicies[] = {fake::Policy::kEager, fake::Policy::kLazy,
                                        fake::Policy::kAhead, fake::Policy::kRandom};
  std::vector<Schedule> all;
  for (std::size_t order = 0; order < 4; ++order) {
    for (std::size_t policy = 0; policy < 4; ++policy) {
      const std::size_t diagonal = (policy + 4 - order) % 4;
      if (kSanitized && diagonal > 1) continue;
      all.push_back({.order = kOrders[order],
                     .policy = kPolicies[policy],
                     .seed = seed + 4 * order + policy,
                     .user_stream = diagonal % 2 == 1});
    }
  }
  return all;
}

/// Starts the fake device anew. Nothing of the old one may be alive.
inline void begin(const Schedule& schedule, fake::Options options = {}) {
  options.policy = schedule.policy;
  options.seed = schedule.seed;
  fake::reset(options);
  simt::options() = {};
  simt::options().order = schedule.order;
  simt::options().seed = schedule.seed;
}

/// Everything that the device gave has come back.
inline void expect_nothing_left() {
  const fake::Stats left = fake::stats();
  EXPECT_EQ(left.device_bytes, 0u);
  EXPECT_EQ(left.pinned_bytes, 0u);
  EXPECT_EQ(left.registered_bytes, 0u);
  EXPECT_EQ(left.streams, 0);
  EXPECT_EQ(left.events, 0);
  EXPECT_EQ(left.queued, 0);
  EXPECT_EQ(fake::findings(), std::vector<std::string>{});
}

inline void must(cudaError_t code) {
  if (code != cudaSuccess) {
    throw std::runtime_error(std::string("test's own call: ") + cudaGetErrorString(code) + ": " +
                             fake::last_failure());
  }
}

/// A call's tensors on the device, as torch would have them.
class CallOnDevice {
 public:
  CallOnDevice(const Call& call, cudaStream_t stream)
      : stream_(stream), out_bytes_(call.hidden.size()) {
    args_ = call.args(nullptr);
    args_.hidden = put(call.hidden.data(), call.hidden.size());
    args_.expert_ids = static_cast<const std::int64_t*>(
        put(call.ids.data(), call.ids.size() * sizeof(std::int64_t)));
    args_.weights = put(call.weights.data(), call.weights.size());
    args_.out = put(nullptr, call.hidden.size());
    args_.stream = StreamHandle{reinterpret_cast<std::uintptr_t>(stream)};
  }
  CallOnDevice(const CallOnDevice&) = delete;
  CallOnDevice& operator=(const CallOnDevice&) = delete;

  [[nodiscard]] const ForwardArgs& args() const { return args_; }
  /// Waits for the stream.
  [[nodiscard]] std::vector<std::byte> out() const {
    std::vector<std::byte> host(out_bytes_);
    if (out_bytes_ == 0) return host;
    must(cudaMemcpyAsync(host.data(), args_.out, out_bytes_, cudaMemcpyDeviceToHost, stream_));
    must(cudaStreamSynchronize(stream_));
    return host;
  }

 private:
  struct Free {
    void operator()(void* memory) const { (void)cudaFree(memory); }
  };

  void* put(const void* source, std::size_t bytes) {
    void* target = nullptr;
    must(cudaMalloc(&target, bytes == 0 ? 1 : bytes));
    memory_.emplace_back(target);
    if (source != nullptr && bytes > 0) {
      must(cudaMemcpyAsync(target, source, bytes, cudaMemcpyHostToDevice, stream_));
    }
    return target;
  }

  cudaStream_t stream_;
  std::size_t out_bytes_;
  std::vector<std::unique_ptr<void, Free>> memory_;
  ForwardArgs args_;
};

/// An engine on the fake device, with its threads, and the stream of the caller.
class CudaRig {
 public:
  CudaRig(const Model& model, EngineOptions options, bool user_stream,
          std::size_t copy_chunk_bytes = 4096, int device = 0) {
    if (user_stream) must(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking));
    try {
      Engine::Parts parts;
      parts.store = model.store();
      parts.device = make_cuda_device(device);
      parts.compute = make_cuda_compute(*parts.device);
      parts.copy_chunk_bytes = copy_chunk_bytes;
      engine_ = std::make_unique<Engine>(std::move(options), std::move(parts), specs(model));
    } catch (...) {
      destroy_stream();
      throw;
    }
  }
  ~CudaRig() {
    engine_.reset();
    destroy_stream();
  }
  CudaRig(const CudaRig&) = delete;
  CudaRig& operator=(const CudaRig&) = delete;

  [[nodiscard]] Engine& engine() { return *engine_; }
  [[nodiscard]] cudaStream_t stream() const { return stream_; }

  [[nodiscard]] std::vector<std::byte> forward(const Call& call) {
    const CallOnDevice on_device(call, stream_);
    engine_->forward(on_device.args());
    return on_device.out();
  }

 private:
  void destroy_stream() {
    if (stream_ != nullptr) (void)cudaStreamDestroy(stream_);
  }
  /// The model's callbacks compute on the host: their matrices take the way there and back.
  [[nodiscard]] std::vector<LayerSpec> specs(const Model& model) {
    std::vector<LayerSpec> specs = model.specs();
    for (LayerSpec& spec : specs) {
      for (auto* const callback : {&spec.gate_callback, &spec.post_expert_callback}) {
        if (!*callback) continue;
        *callback = [this, host = *callback](LayerIdx layer, DType dtype, std::int64_t rows,
                                             std::int64_t in_columns, std::int64_t out_columns,
                                             const void* in, void* out) {
          const std::size_t element = element_bytes(dtype);
          std::vector<std::byte> source(static_cast<std::size_t>(rows * in_columns) * element);
          std::vector<std::byte> target(static_cast<std::size_t>(rows * out_columns) * element);
          must(cudaMemcpyAsync(source.data(), in, source.size(), cudaMemcpyDeviceToHost, stream_));
          must(cudaStreamSynchronize(stream_));
          const int code =
              host(layer, dtype, rows, in_columns, out_columns, source.data(), target.data());
          must(cudaMemcpyAsync(out, target.data(), target.size(), cudaMemcpyHostToDevice, stream_));
          return code;
        };
      }
    }
    return specs;
  }

  cudaStream_t stream_ = nullptr;
  std::unique_ptr<Engine> engine_;
};

}  // namespace sluice::testing
