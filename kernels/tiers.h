#pragma once

#include <cstdint>

#include "base/dtype.h"
#include "kernels/cpu_isa.h"
#include "kernels/gate.h"

// What an instruction tier supplies. Every tier computes the same bits; the scalar one is the
// definition. Tiers are internal to kernels/: callers use the contracts beside this file.

namespace sluice {

/// Partial sums that a dot product keeps, and columns that it takes per step: two per sum, in an
/// order that suits the unpacking of the weights. Part of the numerics contract.
inline constexpr std::int64_t kLanes = 16;
inline constexpr std::int64_t kStep = 2 * kLanes;

/// Column within a step that partial sum `lane` takes at its turn `turn` (0 or 1). bf16 weights
/// unpack into their even and their odd columns by a shift and a mask of one whole register.
constexpr std::int64_t step_column(DType dtype, std::int64_t turn, std::int64_t lane) {
  return dtype == DType::kBF16 ? 2 * lane + turn : kLanes * turn + lane;
}

/// `columns` rounded up to whole steps: the length of a packed vector.
constexpr std::int64_t packed_columns(std::int64_t columns) {
  return (columns + kStep - 1) / kStep * kStep;
}

/// Brings `columns` values into the order in which dot products with `dtype` weights take them,
/// zeros behind them. Shapes: out [packed_columns(columns)].
void pack_columns(DType dtype, const float* in, std::int64_t columns, float* out);

/// Rows of one matrix against the tokens of one expert: out[t][r] = rows[r] · x[t] (+ bias[r]).
///
/// Shapes: rows [num_rows, columns] of the function's dtype, contiguous, aligned to an element;
/// x[t] packed, bias [num_rows] or null, out[t] [num_rows].
struct DotRowsArgs {
  const void* rows = nullptr;
  std::int64_t num_rows = 0;
  std::int64_t columns = 0;
  const float* const* x = nullptr;
  float* const* out = nullptr;
  std::int64_t num_tokens = 0;
  const float* bias = nullptr;
};
using DotRowsFn = void (*)(const DotRowsArgs& args);

/// Element by element, over `count` of them.
struct ElementwiseKernels {
  /// out[i] = gate(g[i], u[i]); `g` is ignored where the kind has no gate.
  void (*gate)(const GateSpec& spec, const float* g, const float* u, float* out,
               std::int64_t count);
  /// sum[i] = fma(weight, row[i], sum[i]).
  void (*accumulate)(float weight, const float* row, float* sum, std::int64_t count);
  void (*widen_bf16)(const void* in, float* out, std::int64_t count);
  void (*widen_f16)(const void* in, float* out, std::int64_t count);
  void (*narrow_bf16)(const float* in, void* out, std::int64_t count);
  void (*narrow_f16)(const float* in, void* out, std::int64_t count);
};

struct DotKernels {
  DotRowsFn f32, bf16, f16;
  [[nodiscard]] DotRowsFn of(DType dtype) const {
    return dtype == DType::kF32 ? f32 : dtype == DType::kBF16 ? bf16 : f16;
  }
};

extern const ElementwiseKernels kElementwiseScalar;
extern const DotKernels kDotScalar;
#if defined(__x86_64__)
extern const ElementwiseKernels kElementwiseAvx2;
extern const ElementwiseKernels kElementwiseAvx512;
extern const DotKernels kDotAvx2;
extern const DotKernels kDotAvx512;
#endif

/// The kernels of a tier.
/// Errors: ConfigError when this machine lacks it.
[[nodiscard]] const ElementwiseKernels& elementwise_kernels(CpuIsa isa);
[[nodiscard]] const DotKernels& dot_kernels(CpuIsa isa);

/// convert.h's functions in a named tier.
void widen(const ElementwiseKernels& kernels, DType dtype, const void* in, float* out,
           std::int64_t count);
void narrow(const ElementwiseKernels& kernels, DType dtype, const float* in, void* out,
            std::int64_t count);

/// One row of `apply_gate`: gate_up [2I] ([I] without a gate), out [I], `count` = I.
void apply_gate_row(const ElementwiseKernels& kernels, const GateSpec& spec, const float* gate_up,
                    float* out, std::int64_t count);

}  // namespace sluice
