#include "tests/emulation/planted/planted.h"

#include "kernels/ptx.h"

namespace simt::planted {
namespace {

// Each lane gets its neighbour's value, by shared memory in the first warp, by shuffle in the
// second, and hands it back.
template <Bug kBug>
__global__ void exchange_kernel(Buffers p) {
  SLUICE_SHARED(int, values, [32]);
  const int i = threadIdx.x, lane = i % 32;
  int value = p.in[i ^ 1];
  if (i < 32) {
    values[lane] = value;
    if constexpr (kBug != Bug::kNoSyncwarp) __syncwarp();
    value = values[lane ^ 1];
  } else {
    if constexpr (kBug == Bug::kShuffleNamesAnExitedLane) {
      if (lane == 5) return;
    }
    if constexpr (kBug == Bug::kShuffleReadsOutsideItsMask) {
      if (lane < 16) value = __shfl_sync(0xFFFFu, value, lane ^ 16);
    }
    if constexpr (kBug == Bug::kMasksDiffer) {
      value = __shfl_xor_sync(lane == 9 ? 0x3FFu : ~0u, value, 1);
    } else {
      value = __shfl_xor_sync(~0u, value, 1);
    }
  }
  if constexpr (kBug == Bug::kExitsBeforeACollective) {
    if (lane == 31) return;
    __syncwarp();
  }
  p.out[i] = 3 * value + 1;
}

}  // namespace

Kernel warp_kernel(Bug bug) {
  return one_of<Bug::kNone, Bug::kNoSyncwarp, Bug::kShuffleNamesAnExitedLane,
                Bug::kShuffleReadsOutsideItsMask, Bug::kMasksDiffer, Bug::kExitsBeforeACollective>(
      bug, [](auto is) -> Kernel { return exchange_kernel<is>; });
}

}  // namespace simt::planted
