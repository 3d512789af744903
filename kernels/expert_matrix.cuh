#pragma once

#include <cstdint>

#include "kernels/elements.cuh"
#include "kernels/expert_list.h"
#include "kernels/gate.cuh"

// What the few-token and the many-token kernels share: which matrix of an expert a launch
// multiplies, which of its rows go together, and what becomes of a finished sum.

namespace sluice::device {

enum class Output : std::int32_t {
  kGate,     ///< gate of a pair, or of a value where the kind has none → out[position, channel]
  kRaw,      ///< rounded to the activations' type → out[position, row]
  kScratch,  ///< fp32 → out[entry, row]
};

/// A launch's matrix. Rows come in pairs (a, b) that one thread finishes together: gate and up row
/// of a channel where `kPaired`, else two rows half a tile apart.
struct ExpertMatrix {
  bool is_w2 = false;        // else w13
  bool interleaved = false;  // gate row of channel c is row 2c, its up row 2c + 1; else c and I + c
  std::int32_t channels = 0;  // I where rows are paired, else R
  std::int32_t columns = 0;   // C
  std::int32_t out_pitch = 0;
  Output output = Output::kGate;
  GateSpec gate = {};
  void* out = nullptr;
};

/// Row of the matrix for half `half` (0: gate, 1: up) of channel `channel`.
__device__ __forceinline__ std::int64_t paired_row(const ExpertMatrix& matrix, int channel,
                                                   int half) {
  return matrix.interleaved ? 2 * channel + half : channel + half * matrix.channels;
}

__device__ __forceinline__ const void* weights_of(const ExpertMatrix& matrix,
                                                  const ExpertWeights& expert) {
  return matrix.is_w2 ? expert.w2 : expert.w13;
}
__device__ __forceinline__ const float* bias_of(const ExpertMatrix& matrix,
                                                const ExpertWeights& expert) {
  return matrix.is_w2 ? expert.b2 : expert.b13;
}

/// Where routed position `position` of the call reads its input: its token's hidden row, or its own
/// row of h.
template <class A>
__device__ __forceinline__ const A* input_row(const ExpertMatrix& matrix, const RoutedRows& routed,
                                              const void* input, std::int32_t position) {
  const std::int64_t row = matrix.is_w2 ? position : routed.rows[position] / routed.top_k;
  return static_cast<const A*>(input) + row * matrix.columns;
}

/// Finishes the sums of channel `channel` for the token at `position`: bias, gate, one rounding.
template <class A>
__device__ __forceinline__ void finish_pair(const ExpertMatrix& matrix, const float* bias,
                                            std::int32_t position, int channel, float gate,
                                            float up) {
  if (bias != nullptr) {
    gate += bias[paired_row(matrix, channel, 0)];
    up += bias[paired_row(matrix, channel, 1)];
  }
  A* const out = static_cast<A*>(matrix.out);
  store_narrow(out + static_cast<std::int64_t>(position) * matrix.out_pitch + channel,
               gate_pair(matrix.gate, gate, up));
}

/// The same for one row of a matrix without pairs; rows past its end are ignored.
template <class A>
__device__ __forceinline__ void finish_row(const ExpertMatrix& matrix, const RoutedRows& routed,
                                           const float* bias, std::int32_t position, int row,
                                           float sum) {
  if (row >= matrix.channels) return;
  if (bias != nullptr) sum += bias[row];
  if (matrix.output == Output::kScratch) {
    float* const out = static_cast<float*>(matrix.out);
    out[static_cast<std::int64_t>(routed.rows[position]) * matrix.out_pitch + row] = sum;
    return;
  }
  if (matrix.output == Output::kGate) sum = gate_single(matrix.gate, sum);
  A* const out = static_cast<A*>(matrix.out);
  store_narrow(out + static_cast<std::int64_t>(position) * matrix.out_pitch + row, sum);
}

}  // namespace sluice::device
