// The many-token kernels for fp32 activations, over weights of any type: FMA.
#include "kernels/expert_tiles.cuh"

namespace sluice::device {

/// FMA: a thread has 4 + 4 rows by 4 tokens, and adds columns one by one in ascending order.
template <class W>
struct FmaTile {
  using Weight = W;
  using Activation = float;
  static constexpr int kStep = 32;
  // Odd multiples of 16 bytes: eight rows read at once lie in different banks.
  static constexpr int kWeightPitch = kStep * static_cast<int>(sizeof(W)) + 16;
  static constexpr int kTokenPitch = kStep * 4 + 16;
  static constexpr int kTokensAt = kTileRows * kWeightPitch;
  static constexpr int kHalfBytes = kTokensAt + kTileTokens * kTokenPitch;

  float sums[2][4][4] = {};  // [half][row][token]

  static __device__ __forceinline__ unsigned char* weight_chunk(unsigned char* half, int row,
                                                                int chunk) {
    return half + row * kWeightPitch + chunk * 16;
  }
  static __device__ __forceinline__ unsigned char* token_chunk(unsigned char* half, int token,
                                                               int chunk) {
    return half + kTokensAt + token * kTokenPitch + chunk * 16;
  }

  // Neighbouring threads have neighbouring rows, which are neighbours in the output.
  static __device__ __forceinline__ int thread_row() { return static_cast<int>(threadIdx.x) % 16; }
  static __device__ __forceinline__ int thread_token() {
    return static_cast<int>(threadIdx.x) / 16;
  }

  __device__ __forceinline__ void add(unsigned char* half, int tokens) {
    constexpr int kColumns = kPerLoad<W>;
#pragma unroll 1
    for (int k = 0; k < kStep / kColumns; ++k) {
#pragma unroll
      for (int part = 0; part < kColumns / 4; ++part) {
        float x[4][4];
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          const float4 v = *reinterpret_cast<const float4*>(
              token_chunk(half, thread_token() + 16 * j, k * (kColumns / 4) + part));
          x[j][0] = v.x;
          x[j][1] = v.y;
          x[j][2] = v.z;
          x[j][3] = v.w;
        }
#pragma unroll
        for (int upper = 0; upper < 2; ++upper) {
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            const int row = upper * kHalfRows + thread_row() + 16 * i;
            float w[4];
            load_four(weight_chunk(half, row, k) + part * 4 * sizeof(W), w);
#pragma unroll
            for (int j = 0; j < 4; ++j) {
              if (16 * j >= tokens) break;
#pragma unroll
              for (int column = 0; column < 4; ++column) {
                sums[upper][i][j] = __fmaf_rn(w[column], x[j][column], sums[upper][i][j]);
              }
            }
          }
        }
      }
    }
  }

  static __device__ __forceinline__ void load_four(const unsigned char* from, float (&w)[4]) {
    if constexpr (sizeof(W) == 4) {
      const float4 v = *reinterpret_cast<const float4*>(from);
      w[0] = v.x;
      w[1] = v.y;
      w[2] = v.z;
      w[3] = v.w;
    } else {
      const uint2 v = *reinterpret_cast<const uint2*>(from);
      w[0] = widen(W{static_cast<std::uint16_t>(v.x)});
      w[1] = widen(W{static_cast<std::uint16_t>(v.x >> 16)});
      w[2] = widen(W{static_cast<std::uint16_t>(v.y)});
      w[3] = widen(W{static_cast<std::uint16_t>(v.y >> 16)});
    }
  }

  __device__ __forceinline__ void store(float* partial, int tokens) const {
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const int token = thread_token() + 16 * j;
      if (token >= tokens) break;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int row = thread_row() + 16 * i;
        partial[token * kSumPitch + row] = sums[0][i][j];
        partial[token * kSumPitch + kHalfRows + row] = sums[1][i][j];
      }
    }
  }
};

template <class List>
void launch_tiles_fma(DType weights, const ExpertTilesPlan& plan, const MatrixLaunch<List>& matrix,
                      std::int32_t min_tokens) {
  dispatch_dtype(weights, [&](auto tag) {
    launch_tiles<FmaTile<typename decltype(tag)::type>>(plan, matrix, min_tokens);
  });
}

template void launch_tiles_fma(DType, const ExpertTilesPlan&, const MatrixLaunch<ExpertEntries>&,
                               std::int32_t);
template void launch_tiles_fma(DType, const ExpertTilesPlan&, const MatrixLaunch<ExpertTable>&,
                               std::int32_t);

}  // namespace sluice::device
