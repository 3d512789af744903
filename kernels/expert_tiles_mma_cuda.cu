// The many-token kernels where weights and activations are of one half type: tensor cores.
#include "kernels/expert_tiles.cuh"

namespace sluice::device {

/// Tensor cores: 8 warps of 16 + 16 rows by 32 tokens. Rows of 128 bytes whose 16-byte chunks are
/// turned by the row's number, so that the eight rows of an ldmatrix lie in different banks.
template <class T>
struct MmaTile {
  using Weight = T;
  using Activation = T;
  static constexpr int kStep = 64;
  static constexpr int kRowBytes = kStep * static_cast<int>(sizeof(T));
  static constexpr int kHalfBytes = (kTileRows + kTileTokens) * kRowBytes;
  static constexpr int kTokenGroups = 4;  // of 8 tokens

  ptx::Accumulators c[2][kTokenGroups] = {};  // [lower or upper half of the rows]

  static __device__ __forceinline__ unsigned char* weight_chunk(unsigned char* half, int row,
                                                                int chunk) {
    return half + row * kRowBytes + (chunk ^ row % 8) * 16;
  }
  static __device__ __forceinline__ unsigned char* token_chunk(unsigned char* half, int token,
                                                               int chunk) {
    return weight_chunk(half, kTileRows + token, chunk);
  }

  static __device__ __forceinline__ int warp_row() {
    return static_cast<int>(threadIdx.x) / 64 * 16;
  }
  static __device__ __forceinline__ int warp_token() {
    return static_cast<int>(threadIdx.x) / 32 % 2 * 32;
  }

  __device__ __forceinline__ void add(unsigned char* half, int tokens) {
    const int lane = static_cast<int>(threadIdx.x) % 32;
    if (warp_token() >= tokens) return;
#pragma unroll
    for (int k = 0; k < kStep / 16; ++k) {
      ptx::FragmentA a[2];
#pragma unroll
      for (int upper = 0; upper < 2; ++upper) {
        // Matrices: rows 0-7 and 8-15 of columns 0-7, then of 8-15: A's four words.
        const int row = upper * kHalfRows + warp_row() + lane % 16;
        ptx::ldmatrix_x4(a[upper].r, weight_chunk(half, row, 2 * k + lane / 16));
      }
#pragma unroll
      for (int group = 0; group < kTokenGroups; group += 2) {
        // Matrices: columns 0-7 and 8-15 of tokens 0-7, then of tokens 8-15: B's two words, twice.
        const int token = warp_token() + 8 * group + lane / 16 * 8 + lane % 8;
        std::uint32_t b[4];
        ptx::ldmatrix_x4(b, token_chunk(half, token, 2 * k + lane / 8 % 2));
#pragma unroll
        for (int upper = 0; upper < 2; ++upper) {
          multiply_add<T>(c[upper][group], a[upper], ptx::FragmentB{{b[0], b[1]}});
          multiply_add<T>(c[upper][group + 1], a[upper], ptx::FragmentB{{b[2], b[3]}});
        }
      }
    }
  }

  __device__ __forceinline__ void store(float* partial, int tokens) const {
    const int lane = static_cast<int>(threadIdx.x) % 32;
#pragma unroll
    for (int group = 0; group < kTokenGroups; ++group) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int token = warp_token() + 8 * group + 2 * (lane % 4) + i % 2;
        const int row = warp_row() + lane / 4 + i / 2 * 8;
        if (token >= tokens) continue;
        partial[token * kSumPitch + row] = c[0][group].r[i];
        partial[token * kSumPitch + kHalfRows + row] = c[1][group].r[i];
      }
    }
  }
};

template <class List>
void launch_tiles_mma(DType dtype, const ExpertTilesPlan& plan, const MatrixLaunch<List>& matrix,
                      std::int32_t min_tokens) {
  dispatch_half(dtype, [&](auto tag) {
    launch_tiles<MmaTile<typename decltype(tag)::type>>(plan, matrix, min_tokens);
  });
}

template void launch_tiles_mma(DType, const ExpertTilesPlan&, const MatrixLaunch<ExpertEntries>&,
                               std::int32_t);
template void launch_tiles_mma(DType, const ExpertTilesPlan&, const MatrixLaunch<ExpertTable>&,
                               std::int32_t);

}  // namespace sluice::device
