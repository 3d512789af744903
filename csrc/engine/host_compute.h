#pragma once

#include <array>
#include <atomic>
#include <cstdint>
#include <span>
#include <vector>

#include "engine/compute.h"
#include "engine/forward.h"
#include "engine/grouping.h"
#include "engine/scratch.h"
#include "kernels/expert_decode.h"
#include "kernels/gemm.h"
#include "store/expert_store.h"

namespace sluice {

/// Rows of a stored matrix that are widened at a time where activations are wider than weights. A
/// constant, because it is the shape of a GEMM: part of law 1.
inline constexpr std::int64_t kWidenRows = 256;

/// The arithmetic on a host device.
///
/// Which path an expert takes depends on its own rows alone: `kFewTokens` or fewer go to the
/// memory-bound kernel, several experts at once (their bits do not depend on each other); more, and
/// every site with a callback, to two GEMMs with the gate between them, one expert at a time.
///
/// Numerics of the many-token path: gathered rows · w13ᵀ in the activations' type, the bias and the
/// gate in fp32, one rounding of h, · w2ᵀ in the activations' type, the bias in fp32.
///
class HostCompute final : public ExpertCompute {
 public:
  HostCompute(ParallelFor& parallel, GemmFn gemm_fn, void* gemm_context)
      : parallel_(parallel), gemm_(gemm_fn), gemm_context_(gemm_context) {}

  [[nodiscard]] const Grouping& begin(const ForwardArgs& args, const StoredLayer& layer,
                                      const LayerSpec& spec) override;
  [[nodiscard]] bool takes_several(const Grouping::Group& group) const override;
  void several(std::span<const ReadyExpert> experts) override;
  void one(const ReadyExpert& expert) override;
  void combine_rows() override;
  void close() noexcept override;

  [[nodiscard]] std::int64_t generic_gate_calls() const override { return generic_gate_calls_; }
  [[nodiscard]] std::uint64_t workspace_bytes() const override { return workspace_bytes_; }

 private:
  void widen_inputs();
  void gemm(std::int64_t rows, std::int64_t n, std::int64_t k, const void* a, const void* weights,
            void* c);
  const void* gate(const ReadyExpert& expert, void* gate_up);
  void add_bias(float* matrix, const float* bias, std::int64_t rows, std::int64_t columns);
  void bias_in_place(void* matrix, const float* bias, std::int64_t rows, std::int64_t columns);
  void scatter(const ReadyExpert& expert, const void* result, const float* bias);
  [[nodiscard]] float* row(std::int64_t idx) {
#if defined(SLUICE_PLANT_LAW1)
    planted_order_.push_back(idx);
#endif
    return rows_ + idx * layer_->layout.hidden;
  }
  [[nodiscard]] std::array<Scratch*, 10> scratches();
  void count_workspace();

  ParallelFor& parallel_;
  const GemmFn gemm_;
  void* const gemm_context_;

  const ForwardArgs* args_ = nullptr;
  const StoredLayer* layer_ = nullptr;
  const LayerSpec* spec_ = nullptr;
  Grouping grouping_;
  float* rows_ = nullptr;  // [T · K, H]
  std::int64_t generic_gate_calls_ = 0;
  std::atomic<std::uint64_t> workspace_bytes_{0};

  Scratch row_scratch_;
  Scratch input_scratch_;  // widened hidden rows of the few-token path
  Scratch decode_scratch_;
  Scratch gather_scratch_;   // [M, H]
  Scratch gate_up_scratch_;  // [M, 2I] in the activations' type
  Scratch gate_up_f32_scratch_;
  Scratch h_scratch_;  // [M, I]
  Scratch h_f32_scratch_;
  Scratch result_scratch_;  // [M, H], twice where a callback follows
  Scratch widen_scratch_;   // [kWidenRows, max(H, I)] f32

  std::vector<std::int32_t> input_of_token_;  // position of a token in input_scratch_, −1: none
  std::vector<ExpertWork> works_;
  std::vector<const float*> inputs_;
  std::vector<float*> outputs_;
#if defined(SLUICE_PLANT_LAW1)
  std::vector<std::int64_t> planted_order_;
#endif
};

}  // namespace sluice
