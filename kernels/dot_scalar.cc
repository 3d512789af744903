#include <cmath>

#include "kernels/tiers.h"

namespace sluice {
namespace {

/// The definition of a dot product (expert_decode.h, Numerics).
template <class T, DType kDType>
float dot(const T* row, const float* x, std::int64_t columns) {
  float sum[kLanes] = {};
  for (std::int64_t begin = 0; begin < columns; begin += kStep) {
    for (std::int64_t turn = 0; turn < kStep / kLanes; ++turn) {
      for (std::int64_t lane = 0; lane < kLanes; ++lane) {
        const std::int64_t column = begin + step_column(kDType, turn, lane);
        const float w = column < columns ? to_float(row[column]) : 0.0f;
        sum[lane] = std::fma(w, x[begin + kLanes * turn + lane], sum[lane]);
      }
    }
  }
  for (std::int64_t half = kLanes / 2; half > 0; half /= 2) {
    for (std::int64_t lane = 0; lane < half; ++lane) sum[lane] += sum[lane + half];
  }
  return sum[0];
}

template <class T, DType kDType>
void dot_rows(const DotRowsArgs& args) {
  const T* row = static_cast<const T*>(args.rows);
  for (std::int64_t r = 0; r < args.num_rows; ++r, row += args.columns) {
    for (std::int64_t t = 0; t < args.num_tokens; ++t) {
      const float sum = dot<T, kDType>(row, args.x[t], args.columns);
      args.out[t][r] = args.bias == nullptr ? sum : sum + args.bias[r];
    }
  }
}

}  // namespace

const DotKernels kDotScalar = {.f32 = dot_rows<float, DType::kF32>,
                               .bf16 = dot_rows<BFloat16, DType::kBF16>,
                               .f16 = dot_rows<Float16, DType::kF16>};

}  // namespace sluice
