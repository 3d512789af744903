#include "kernels/ptx.h"
#include "tests/emulation/planted/planted.h"

namespace simt::planted {
namespace {

// Six blocks of 64 write a row of `scratch` each; the last to count itself adds them up.
template <Bug kBug>
__global__ void combine_kernel(Buffers p) {
  SLUICE_SHARED(unsigned, ticket, [1]);
  const int i = threadIdx.x;
  p.scratch[blockIdx.x * 64 + i] = blockIdx.x == 0 ? 3 * p.in[i] + 1 : 0;
  if constexpr (kBug == Bug::kFenceBeforeTheBarrier) {
    // Before the barrier: the others' writes come later.
    if (i == 0) __threadfence();
  }
  __syncthreads();
  if (i == 0) {
    if constexpr (kBug != Bug::kNoFence && kBug != Bug::kFenceBeforeTheBarrier) __threadfence();
    if constexpr (kBug == Bug::kPlainCounter) {
      ticket[0] = (*p.counter)++;
    } else {
      ticket[0] = atomicAdd(p.counter, 1u);
    }
  }
  __syncthreads();
  if (ticket[0] != gridDim.x - 1) return;
  int sum = 0;
  for (unsigned block = 0; block < gridDim.x; ++block) sum += p.scratch[block * 64 + i];
  p.out[i] = sum;
}

__global__ void unordered_kernel(Buffers p) {
  // Right only when block 0 happens to run first.
  if (blockIdx.x == 0) {
    p.scratch[threadIdx.x] = 3 * p.in[threadIdx.x] + 1;
  } else {
    p.out[threadIdx.x] = p.scratch[threadIdx.x];
  }
}

__global__ void wait_kernel(Buffers p) {
  if (threadIdx.x == 0) {
    while (sluice::ptx::load_acquire_sys(p.counter) != 1) {
    }
  }
  __syncthreads();
  p.out[threadIdx.x] = 3 * p.in[threadIdx.x] + 1;
}

}  // namespace

Kernel last_block_kernel(Bug bug) {
  return one_of<Bug::kNone, Bug::kPlainCounter, Bug::kNoFence, Bug::kFenceBeforeTheBarrier>(
      bug, [](auto is) -> Kernel { return combine_kernel<is>; });
}

Kernel unordered_blocks_kernel() { return unordered_kernel; }
Kernel waiting_kernel() { return wait_kernel; }

}  // namespace simt::planted
