#include "kernels/ptx.h"
#include "tests/emulation/planted/planted.h"

namespace simt::planted {
namespace {

namespace ptx = sluice::ptx;

// Through both kinds of shared memory and back.
template <Bug kBug>
__global__ void shared_kernel(Buffers p) {
  constexpr int kElements = kBug == Bug::kStaticSharedTooLarge ? 48 * 256 + 1 : 64;
  SLUICE_SHARED(int, fixed, [kElements]);
  SLUICE_DYNAMIC_SHARED(bytes);
  int* const dynamic = reinterpret_cast<int*>(bytes);
  const int i = threadIdx.x;
  const int beyond_fixed = kBug == Bug::kPastStaticShared ? 1 : 0;
  const int beyond_dynamic = kBug == Bug::kPastDynamicShared ? 1 : 0;
  fixed[i + beyond_fixed] = p.in[i];
  __syncthreads();
  dynamic[i + beyond_dynamic] = fixed[i + beyond_fixed] * 3;
  __syncthreads();
  p.out[i] = dynamic[i + beyond_dynamic] + 1;
}

__device__ __attribute__((noinline)) int depth(int n) {
  volatile int frame[64];
  frame[n % 64] = n;
  return n == 0 ? 0 : depth(n - 1) + frame[n % 64] - n + 1;
}

__global__ void recurse_kernel(Buffers p) {
  p.out[threadIdx.x] = 3 * p.in[threadIdx.x] + 1 + (depth(1 << 20) & 0);
}

// Loads that are wider than what they use, or than their address allows.
template <Bug kBug>
__global__ void load_kernel(Buffers p) {
  SLUICE_SHARED(std::uint16_t, rows, [64][8]);
  const int i = threadIdx.x;
  int value = p.in[i];
  if constexpr (kBug == Bug::kNarrowedMisalignedLoad) {
    // Of sixteen bytes the compiler loads the four that are used.
    value = reinterpret_cast<const int4*>(p.in + i % 32)->x + i - i % 32;
  }
  if constexpr (kBug == Bug::kMisalignedStream) {
    value = static_cast<int>(ptx::load_stream(p.in + i % 32).x) + i - i % 32;
  }
  if constexpr (kBug == Bug::kMisalignedMatrix) {
    for (int k = 0; k < 8; ++k) rows[i][k] = 0;
    __syncthreads();
    std::uint32_t matrices[4];
    ptx::ldmatrix_x4(matrices, &rows[i][i == 33 ? 1 : 0]);
    value += static_cast<int>(matrices[0]);
  }
  p.out[i] = 3 * value + 1;
}

__global__ void read_kernel(Buffers p) { p.out[threadIdx.x] = 3 * p.in[threadIdx.x] + 1; }

__global__ void write_kernel(Buffers p) { p.scratch[threadIdx.x] = static_cast<int>(threadIdx.x); }

}  // namespace

Kernel memory_kernel(Bug bug) {
  if (bug == Bug::kStackOverflow) return recurse_kernel;
#if defined(SLUICE_EMULATE)  // ptxas refuses it: nothing is left to find
  if (bug == Bug::kStaticSharedTooLarge) return shared_kernel<Bug::kStaticSharedTooLarge>;
#endif
  const Kernel shared = one_of<Bug::kNone, Bug::kPastStaticShared, Bug::kPastDynamicShared>(
      bug, [](auto is) -> Kernel { return shared_kernel<is>; });
  if (shared != nullptr) return shared;
  return one_of<Bug::kNarrowedMisalignedLoad, Bug::kMisalignedStream, Bug::kMisalignedMatrix>(
      bug, [](auto is) -> Kernel { return load_kernel<is>; });
}

Kernel reading_kernel() { return read_kernel; }
Kernel writing_kernel() { return write_kernel; }

}  // namespace simt::planted
