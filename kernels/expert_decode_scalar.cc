#include <cmath>

#include "kernels/tiers.h"

namespace sluice {
namespace {

/// The definition of a dot product (expert_decode.h, Numerics).
template <class T>
float dot(const T* row, const float* x, std::int64_t columns) {
  float lane[kLanes] = {};
  for (std::int64_t begin = 0; begin < columns; begin += kLanes) {
    for (std::int64_t l = 0; l < kLanes; ++l) {
      const bool real = begin + l < columns;
      const float w = real ? to_float(row[begin + l]) : 0.0f;
      lane[l] = std::fma(w, real ? x[begin + l] : 0.0f, lane[l]);
    }
  }
  for (std::int64_t half = kLanes / 2; half > 0; half /= 2) {
    for (std::int64_t l = 0; l < half; ++l) lane[l] += lane[l + half];
  }
  return lane[0];
}

template <class T>
void dot_rows(const DotRowsArgs& args) {
  const T* row = static_cast<const T*>(args.rows);
  for (std::int64_t r = 0; r < args.num_rows; ++r, row += args.columns) {
    for (std::int64_t t = 0; t < args.num_tokens; ++t) {
      const float sum = dot(row, args.x[t], args.columns);
      args.out[t][r] = args.bias == nullptr ? sum : sum + args.bias[r];
    }
  }
}

}  // namespace

const DotKernels kDotScalar = {
    .f32 = dot_rows<float>, .bf16 = dot_rows<BFloat16>, .f16 = dot_rows<Float16>};

}  // namespace sluice
