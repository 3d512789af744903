// The decode pair for fp32 activations, over weights of any type: FMA.
#include "kernels/expert_gemv.cuh"

namespace sluice::device {

/// A lane's share of one warp's sums, by FMA: lane 4g + t sums its own columns of rows g and g + 8
/// for every token, ascending; the four lanes of a row are added at the end, (0 + 1) + (2 + 3).
template <class W>
struct FmaSums {
  using Weight = W;
  using Activation = float;
  static constexpr int kColumns = kPerLoad<W>;
  float sums[kGemvTokens][2] = {};

  __device__ __forceinline__ void add(const uint4& a, const uint4& b, const float* x, int pitch,
                                      int tokens, int lane) {
    float row_a[kColumns];
    float row_b[kColumns];
    widen_load<W>(a, row_a);
    widen_load<W>(b, row_b);
    const float* const column = x + kColumns * (lane % 4);
#pragma unroll
    for (int token = 0; token < kGemvTokens; ++token) {
      if (token >= tokens) break;
#pragma unroll
      for (int i = 0; i < kColumns; i += 4) {
        const float4 v = *reinterpret_cast<const float4*>(column + token * pitch + i);
        const float values[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          sums[token][0] = __fmaf_rn(row_a[i + j], values[j], sums[token][0]);
          sums[token][1] = __fmaf_rn(row_b[i + j], values[j], sums[token][1]);
        }
      }
    }
  }

  __device__ __forceinline__ void store(float* partial, int tokens, int lane) {
    const int g = lane / 4;
#pragma unroll
    for (int token = 0; token < kGemvTokens; ++token) {
      if (token >= tokens) break;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float sum = sums[token][half];
        sum += __shfl_xor_sync(0xffffffffu, sum, 1);
        sum += __shfl_xor_sync(0xffffffffu, sum, 2);
        if (lane % 4 == token % 4) partial[token * kPartialPitch + g + 8 * half] = sum;
      }
    }
  }
};

template <class List>
void launch_gemv_fma(DType weights, const ExpertGemvPlan& plan, const MatrixLaunch<List>& matrix) {
  dispatch_dtype(
      weights, [&](auto tag) { launch_gemv<FmaSums<typename decltype(tag)::type>>(plan, matrix); });
}

template void launch_gemv_fma(DType, const ExpertGemvPlan&, const MatrixLaunch<ExpertEntries>&);
template void launch_gemv_fma(DType, const ExpertGemvPlan&, const MatrixLaunch<ExpertTable>&);

}  // namespace sluice::device
