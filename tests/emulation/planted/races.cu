#include "kernels/ptx.h"
#include "tests/emulation/planted/planted.h"

namespace simt::planted {
namespace {

namespace ptx = sluice::ptx;

// Accesses of one word of shared memory by many. Shuffles make lanes go in step and order nothing.
template <Bug kBug>
__global__ void word_kernel(Buffers p) {
  SLUICE_SHARED(int, word, [1]);
  SLUICE_SHARED(unsigned, count, [1]);
  const int i = threadIdx.x;
  if (i == 0) {
    word[0] = 0;
    count[0] = 0;
  }
  __syncthreads();
  atomicAdd(&count[0], 1u);
  int value = p.in[i];
  if (kBug != Bug::kAnotherLaneHasRead || i < 32) value += word[0];
  if (kBug == Bug::kPlainReadBesideAtomics && i == 20) value += count[0] > 64 ? 1 : 0;
  value = __shfl_sync(~0u, value, i % 32);
  if (kBug == Bug::kAnotherWarpHasRead && i == 63) word[0] = 0;
  if (kBug == Bug::kAnotherLaneHasRead && i == 31) word[0] = 0;
  __syncthreads();
  if (kBug == Bug::kNone && i == 63) word[0] = 1;
  p.out[i] = 3 * value + 1 + static_cast<int>(count[0]) - 64;
}

// A double buffer of cp.async: the next stage is under way while this one is read.
template <Bug kBug>
__global__ void staged_kernel(Buffers p) {
  constexpr int kStages = 5;
  SLUICE_SHARED(int, buffer, [2][16][4]);
  const int i = threadIdx.x;
  const auto load = [&](int stage) {
    if (stage < kStages && i < 16) ptx::cp_async16(buffer[stage % 2][i], p.in + 4 * i);
    ptx::cp_async_commit();
  };
  load(0);
  int sum = 0;
  for (int stage = 0; stage < kStages; ++stage) {
    load(stage + 1);
    ptx::cp_async_wait<kBug == Bug::kWaitsForTooFew ? 2 : 1>();
    __syncthreads();
    sum += buffer[stage % 2][i / 4][i % 4];
    if constexpr (kBug != Bug::kNoBarrierBeforeRefill) __syncthreads();
  }
  ptx::cp_async_wait<0>();
  p.out[i] = 3 * (sum / kStages) + 1;
}

// Halves of a warp that synchronise by themselves, then with all.
__global__ void halves_kernel(Buffers p) {
  SLUICE_SHARED(int, values, [64]);
  const int i = threadIdx.x;
  values[i] = p.in[i];
  __syncwarp(i % 32 < 16 ? 0xFFFFu : 0xFFFF0000u);
  const int neighbour = values[i ^ 1];
  __syncwarp();
  values[i] = neighbour;
  __syncwarp();
  p.out[i] = 3 * values[i ^ 1] + 1;
}

__global__ void write_after_read_kernel(Buffers p) {
  const int i = threadIdx.x;
  if (blockIdx.x == 0) {
    p.out[i] = 3 * p.in[i] + 1;
  } else {
    const_cast<int*>(p.in)[i] = i;
  }
}

}  // namespace

Kernel race_kernel(Bug bug) {
  return one_of<Bug::kNone, Bug::kAnotherWarpHasRead, Bug::kAnotherLaneHasRead,
                Bug::kPlainReadBesideAtomics>(bug,
                                              [](auto is) -> Kernel { return word_kernel<is>; });
}

Kernel stages_kernel(Bug bug) {
  return one_of<Bug::kNone, Bug::kNoBarrierBeforeRefill, Bug::kWaitsForTooFew>(
      bug, [](auto is) -> Kernel { return staged_kernel<is>; });
}

Kernel half_warps_kernel() { return halves_kernel; }
Kernel write_after_foreign_read_kernel() { return write_after_read_kernel; }

}  // namespace simt::planted
