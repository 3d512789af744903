#include "kernels/ptx.h"
#include "tests/emulation/planted/planted.h"

namespace simt::planted {
namespace {

namespace ptx = sluice::ptx;

constexpr int kWarps = kProductThreads / 32;

// x into shared memory, rows of `pitch` elements.
template <Bug kBug>
__device__ __forceinline__ void stage(__nv_bfloat16* staged, int pitch, const ProductArgs& p) {
  const int per_row = p.columns / 8;
  for (int i = threadIdx.x; i < p.tokens * per_row; i += kProductThreads) {
    const int token = i / per_row, column = i % per_row * 8;
    ptx::cp_async16(staged + token * pitch + column,
                    p.x + static_cast<long>(token) * p.columns + column);
  }
  ptx::cp_async_commit();
  if constexpr (kBug != Bug::kNoCopyWait) ptx::cp_async_wait<0>();
  if constexpr (kBug != Bug::kNoBarrierAfterStaging) __syncthreads();
}

// This warp's part of one tile of 16 rows: columns 32 (warp + kWarps i). Lane 4g + t reads eight
// neighbours of rows g and g + 8; k is only a label, so two mma take them as they lie.
template <Bug kBug>
__device__ __forceinline__ ptx::Accumulators multiply(const ProductArgs& p, int tile,
                                                      const __nv_bfloat16* staged, int pitch) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
  const __nv_bfloat16* const low = p.w + static_cast<long>(tile * 16 + g) * p.columns;
  const __nv_bfloat16* const high = low + 8l * p.columns;
  const __nv_bfloat16* const x = staged + (g < p.tokens ? g : 0) * pitch;
  const int end = p.columns + (kBug == Bug::kReadsPastTheRow ? 32 : 0);
  ptx::Accumulators c = {};
  for (int k = warp * 32; k < end; k += kWarps * 32) {
    const uint4 a = ptx::load_stream(low + k + 8 * t);
    const uint4 b = ptx::load_stream(high + k + 8 * t);
    const int column = min(k, p.columns - 32) + (kBug == Bug::kStagedIndexHalved ? 4 : 8) * t;
    const uint4 v = *reinterpret_cast<const uint4*>(x + column);
    if constexpr (kBug == Bug::kFragmentsExchanged) {
      ptx::mma_bf16(c, {{a.x, a.y, b.x, b.y}}, {{v.x, v.y}});
    } else {
      ptx::mma_bf16(c, {{a.x, b.x, a.y, b.y}}, {{v.x, v.y}});
    }
    if (kBug != Bug::kLaneSkipsMma || lane != 31) {
      ptx::mma_bf16(c, {{a.z, b.z, a.w, b.w}}, {{v.z, v.w}});
    }
  }
  return c;
}

template <Bug kBug>
__global__ void __launch_bounds__(kProductThreads)
    multiply_kernel(const __grid_constant__ ProductArgs p) {
  SLUICE_DYNAMIC_SHARED(bytes);
  SLUICE_SHARED(float, partial, [kWarps][32][4]);
  __nv_bfloat16* const staged = reinterpret_cast<__nv_bfloat16*>(bytes);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
  const int pitch = p.columns + 8;
  if constexpr (kBug != Bug::kNoDependencyWait) ptx::grid_dependency_wait();
  stage<kBug>(staged, pitch, p);
  for (int tile = blockIdx.x; tile < p.rows / 16; tile += gridDim.x) {
    const ptx::Accumulators c = multiply<kBug>(p, tile, staged, pitch);
    for (int i = 0; i < 4; ++i) partial[warp][lane][i] = c.r[i];
    if constexpr (kBug != Bug::kNoBarrierAfterPartials) __syncthreads();
    if (warp == 0) {
      for (int i = 0; i < 4; ++i) {
        float sum = 0.0f;
        for (int w = 0; w < kWarps; ++w) sum += partial[w][lane][i];
        const int token = 2 * t + i % 2, row = tile * 16 + g + i / 2 * 8;
        if (token < p.tokens + (kBug == Bug::kWritesARowTooMany ? 1 : 0)) {
          p.y[static_cast<long>(token) * p.rows + row] = sum;
        }
      }
    }
    if constexpr (kBug == Bug::kReadsTheNeighbourSlot) {
      // A prefetch of the next tile that forgets where the last one ends. No result depends on it.
      const uint4 next = ptx::load_stream(p.w + static_cast<long>(tile + 1) * 16 * p.columns);
      if (next.x == 0x12345678u && next.y == 0x9ABCDEF0u) p.y[0] += 1.0f;
    }
    if constexpr (kBug == Bug::kBarrierInOneWarp) {
      if (warp == 0) __syncthreads();
    } else if constexpr (kBug != Bug::kNoBarrierAtLoopEnd) {
      __syncthreads();
    }
  }
}

}  // namespace

ProductKernel product_kernel(Bug bug) {
  return one_of<Bug::kNone, Bug::kFragmentsExchanged, Bug::kStagedIndexHalved,
                Bug::kNoBarrierAfterPartials, Bug::kNoBarrierAtLoopEnd, Bug::kNoBarrierAfterStaging,
                Bug::kNoCopyWait, Bug::kNoDependencyWait, Bug::kReadsPastTheRow,
                Bug::kWritesARowTooMany, Bug::kLaneSkipsMma, Bug::kBarrierInOneWarp,
                Bug::kReadsTheNeighbourSlot>(
      bug, [](auto is) -> ProductKernel { return multiply_kernel<is>; });
}

}  // namespace simt::planted
