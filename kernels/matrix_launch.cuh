#pragma once

#include <cstddef>
#include <cstdint>

#include "kernels/expert_matrix.cuh"
#include "kernels/launch.h"
#include "kernels/launch_check.h"

// The host's side of the decode pair and of the many-token kernels: one launch over one matrix of
// the listed experts, its checks, and the choice between the instantiations.

namespace sluice::device {

/// A launch, beside its plan.
template <class List>
struct MatrixLaunch {
  const char* name = nullptr;  // a literal
  const List& list;
  RoutedRows routed;
  ExpertMatrix matrix;
  const void* input = nullptr;  // [T, H] for w13, [T · K, I] for w2
  StreamHandle stream = {};
  bool overlap_previous = false;
};

/// w13 with its gate: I channels.
[[nodiscard]] inline ExpertMatrix gated_w13(const ExpertProblem& problem, void* out) {
  const auto intermediate = static_cast<std::int32_t>(problem.intermediate);
  return {.is_w2 = false,
          .interleaved = problem.gate.interleaved,
          .channels = intermediate,
          .columns = static_cast<std::int32_t>(problem.hidden),
          .out_pitch = intermediate,
          .output = Output::kGate,
          .gate = problem.gate,
          .out = out};
}

/// w13 as its rows lie: whether gate and up rows alternate is the caller's business.
[[nodiscard]] inline ExpertMatrix raw_w13(const ExpertProblem& problem, std::int64_t num_rows,
                                          void* out) {
  const auto rows = static_cast<std::int32_t>(num_rows);
  return {.is_w2 = false,
          .channels = rows,
          .columns = static_cast<std::int32_t>(problem.hidden),
          .out_pitch = rows,
          .output = Output::kRaw,
          .out = out};
}

/// w2, whose rows become `output`: kScratch or kRaw.
[[nodiscard]] inline ExpertMatrix plain_w2(const ExpertProblem& problem, Output output, void* out) {
  const auto hidden = static_cast<std::int32_t>(problem.hidden);
  return {.is_w2 = true,
          .channels = hidden,
          .columns = static_cast<std::int32_t>(problem.intermediate),
          .out_pitch = hidden,
          .output = output,
          .out = out};
}

/// Whether its rows end in pairs, a gate row with its up row.
[[nodiscard]] inline bool is_paired(const ExpertMatrix& matrix) {
  return matrix.output == Output::kGate && is_gated(matrix.gate.kind);
}

/// Errors: ConfigError for rows that are not aligned.
template <class List>
void check_rows(const MatrixLaunch<List>& matrix) {
  check_aligned(matrix.name, "the input rows", matrix.input);
  check_aligned(matrix.name, "the output rows", matrix.matrix.out);
}

/// Enqueues `paired` or `single`, whichever the matrix asks for, on a one-dimensional grid.
template <class List, class Params>
void launch_matrix(const MatrixLaunch<List>& matrix, int blocks, int threads,
                   std::size_t shared_bytes, const Params& params, void (*paired)(Params),
                   void (*single)(Params)) {
  const LaunchShape shape{.grid = dim3(static_cast<unsigned>(blocks)),
                          .block = dim3(static_cast<unsigned>(threads)),
                          .shared_bytes = shared_bytes,
                          .stream = to_cuda(matrix.stream),
                          .overlap_previous = matrix.overlap_previous};
  check_launch(matrix.name,
               launch(matrix.name, shape, is_paired(matrix.matrix) ? paired : single, params));
}

/// dispatch_dtype (base/dtype.h) where fp32 has a kernel of its own: kBF16, else kF16.
template <class Fn>
void dispatch_half(DType dtype, Fn&& fn) {
  dtype == DType::kBF16 ? fn(TypeTag<BFloat16>{}) : fn(TypeTag<Float16>{});
}

}  // namespace sluice::device
