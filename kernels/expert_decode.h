#pragma once

#include <cstdint>
#include <span>

#include "base/dtype.h"
#include "base/parallel.h"
#include "kernels/cpu_isa.h"
#include "kernels/expert_weights.h"

namespace sluice {

/// Most tokens of one expert in one call that take the few-token path; above, the GEMM does. A
/// constant of the expert's own token count: part of law 1, never tuned at run time. At 8 tokens a
/// core of an EPYC 9004 got through bf16 / fp16 / fp32 weights of [2816, 2048] at 11.8 / 11.4
/// / 13.0 GB/s, torch.mm (2.13, one thread, same run) at 8.1 / 2.4 / 6.4; at 12 they are even in
/// bf16.
inline constexpr std::int64_t kFewTokens = 8;

/// One expert and the tokens that chose it in this call.
struct ExpertWork {
  ExpertWeights weights;
  const float* const* inputs = nullptr;  // num_tokens rows [H], widened to fp32
  float* const* outputs = nullptr;       // num_tokens rows [H]
  std::int32_t num_tokens = 0;           // 1 … kFewTokens
};

/// Any gate but kGeneric.
using ExpertDecodeProblem = ExpertProblem;

/// Floats of scratch that `expert_decode` needs for `total_tokens` (over all works).
[[nodiscard]] std::int64_t expert_decode_scratch(const ExpertDecodeProblem& problem,
                                                 std::int64_t total_tokens);

/// outputs[t] = w2 · gate(w13 · inputs[t] + b13) + b2 for every work, memory-bound: each weight is
/// read from memory once, whatever the number of tokens. Allocates nothing.
///
/// Numerics: weights widen to fp32 in registers; a dot product keeps 16 partial sums by fused
/// multiply-add in ascending order: sum l takes columns l, l + 16, … (bf16 weights: 2l, 2l + 1,
/// 2l + 32, 2l + 33, …), missing columns up to a multiple of 32 counting as zeros, folded by halves
/// (8, 4, 2, 1); the bias is added last. So the bits of a row depend on its own weights and inputs
/// alone: not on the tier, the number of threads, or the other works.
/// Thread safety: reentrant; `parallel` and `scratch` belong to the caller.
void expert_decode(const ExpertDecodeProblem& problem, std::span<const ExpertWork> works,
                   float* scratch, ParallelFor& parallel);

/// The same with a named tier, for tests and benchmarks.
/// Errors: ConfigError when this machine lacks it.
void expert_decode(CpuIsa isa, const ExpertDecodeProblem& problem,
                   std::span<const ExpertWork> works, float* scratch, ParallelFor& parallel);

}  // namespace sluice
