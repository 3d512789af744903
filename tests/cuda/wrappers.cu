// One kernel per function of kernels/ptx.h, for test_wrappers.py: operands come from memory in
// their order and go back in it, so that the PTX shows which register is which operand.
#include "kernels/ptx.h"

namespace ptx = sluice::ptx;

template <class T>
__global__ void mma(const std::uint32_t* a, const std::uint32_t* b, float* c) {
  ptx::FragmentA fragment_a;
  ptx::FragmentB fragment_b;
  ptx::Accumulators sums;
  for (int i = 0; i < 4; ++i) fragment_a.r[i] = a[i];
  for (int i = 0; i < 2; ++i) fragment_b.r[i] = b[i];
  for (int i = 0; i < 4; ++i) sums.r[i] = c[i];
  ptx::mma<T>(sums, fragment_a, fragment_b);
  for (int i = 0; i < 4; ++i) c[i] = sums.r[i];
}
template __global__ void mma<__nv_bfloat16>(const std::uint32_t*, const std::uint32_t*, float*);
template __global__ void mma<__half>(const std::uint32_t*, const std::uint32_t*, float*);

template <bool kTransposed>
__global__ void load_matrices(std::uint32_t* to) {
  SLUICE_SHARED(std::uint32_t, rows, [128]);
  rows[threadIdx.x] = threadIdx.x;
  __syncthreads();
  std::uint32_t words[4];
  if constexpr (kTransposed) {
    ptx::ldmatrix_x4_trans(words, rows + 4 * threadIdx.x);
  } else {
    ptx::ldmatrix_x4(words, rows + 4 * threadIdx.x);
  }
  for (int i = 0; i < 4; ++i) to[i] = words[i];
}
template __global__ void load_matrices<false>(std::uint32_t*);
template __global__ void load_matrices<true>(std::uint32_t*);

__global__ void load_stream(const void* from, std::uint32_t* to) {
  const uint4 value = ptx::load_stream(from);
  to[0] = value.x;
  to[1] = value.y;
  to[2] = value.z;
  to[3] = value.w;
}

__global__ void copy_async(const void* from, int bytes, std::uint32_t* to) {
  SLUICE_SHARED(std::uint32_t, staged, [4]);
  ptx::cp_async16(staged, from, bytes);
  ptx::cp_async_commit();
  ptx::cp_async_wait<1>();
  ptx::cp_async_wait<0>();
  __syncthreads();
  *to = staged[threadIdx.x];
}

__global__ void depend(std::uint32_t* to) {
  ptx::grid_dependency_wait();
  ptx::grid_launch_dependents();
  *to = 1;
}

__global__ void order(std::uint32_t* flags) {
  ptx::store_release_gpu(flags + 1, ptx::load_acquire_gpu(flags));
  ptx::store_release_sys(flags + 3, ptx::load_acquire_sys(flags + 2));
}
