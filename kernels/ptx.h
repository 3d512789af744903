#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

// Every instruction that CUDA C++ has no words for, each with two bodies: the real one, and one for
// the tests' emulation, which compiles every .cu with g++ and SLUICE_EMULATE (and brings `simt`
// itself). The only file with `asm` or __CUDA_ARCH__. Bodies stay tiny: the emulation cannot see a
// mistake in a real one, only `tests/cuda`'s golden PTX and a GPU can.
//
// Fragments of mma.m16n8k16 (PTX ISA, "Matrix fragments for mma.m16n8k16"), for lane = 4 g + t:
//   A [16, 16]: r[0] = (g; 2t, 2t+1), r[1] = (g+8; 2t, 2t+1), r[2] = (g; 2t+8, 2t+9),
//               r[3] = (g+8; 2t+8, 2t+9); the first of a pair in the low half
//   B [16, 8]:  r[0] = (2t, 2t+1; g), r[1] = (2t+8, 2t+9; g)
//   C [16, 8]:  r[0], r[1] = (g; 2t, 2t+1), r[2], r[3] = (g+8; 2t, 2t+1)

#if defined(SLUICE_EMULATE)
/// SLUICE_SHARED(float, partial, [kWarps][32]); declares static shared memory in a kernel.
#define SLUICE_SHARED(T, name, ...) auto& name = ::simt::shared_object<T __VA_ARGS__>(#name, [] {})
/// SLUICE_DYNAMIC_SHARED(bytes); names the launch's dynamic shared memory, 16-byte aligned.
#define SLUICE_DYNAMIC_SHARED(name) unsigned char* const name = ::simt::dynamic_shared()
// Reports of the emulation name the line of the kernel.
#define SLUICE_PTX_SITE , ::simt::Site site = ::simt::Site::here()
#define SLUICE_PTX_ONLY_SITE ::simt::Site site = ::simt::Site::here()
#else
#define SLUICE_SHARED(T, name, ...) __shared__ __align__(16) T name __VA_ARGS__
#define SLUICE_DYNAMIC_SHARED(name) extern __shared__ __align__(16) unsigned char name[]
#define SLUICE_PTX_SITE
#define SLUICE_PTX_ONLY_SITE
#endif

namespace sluice::ptx {

struct FragmentA {
  std::uint32_t r[4];
};
struct FragmentB {
  std::uint32_t r[2];
};
struct Accumulators {
  float r[4];
};

/// c += a · b with bf16 operands, fp32 accumulators; all 32 lanes.
__device__ __forceinline__ void mma_bf16(Accumulators& c, const FragmentA& a,
                                         const FragmentB& b SLUICE_PTX_SITE) {
#if defined(SLUICE_EMULATE)
  ::simt::mma_m16n8k16(::simt::MmaType::kBf16, c.r, a.r, b.r, site);
#else
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(c.r[0]), "+f"(c.r[1]), "+f"(c.r[2]), "+f"(c.r[3])
      : "r"(a.r[0]), "r"(a.r[1]), "r"(a.r[2]), "r"(a.r[3]), "r"(b.r[0]), "r"(b.r[1]));
#endif
}

/// c += a · b with fp16 operands, fp32 accumulators; all 32 lanes.
__device__ __forceinline__ void mma_fp16(Accumulators& c, const FragmentA& a,
                                         const FragmentB& b SLUICE_PTX_SITE) {
#if defined(SLUICE_EMULATE)
  ::simt::mma_m16n8k16(::simt::MmaType::kFp16, c.r, a.r, b.r, site);
#else
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(c.r[0]), "+f"(c.r[1]), "+f"(c.r[2]), "+f"(c.r[3])
      : "r"(a.r[0]), "r"(a.r[1]), "r"(a.r[2]), "r"(a.r[3]), "r"(b.r[0]), "r"(b.r[1]));
#endif
}

/// The mma of the operands' type `T`: __nv_bfloat16 or __half.
template <class T>
__device__ __forceinline__ void mma(Accumulators& c, const FragmentA& a,
                                    const FragmentB& b SLUICE_PTX_SITE);
#if defined(SLUICE_EMULATE)
#define SLUICE_PTX_PASS_SITE , site
#define SLUICE_PTX_SITE_PARAMETER , ::simt::Site site
#else
#define SLUICE_PTX_PASS_SITE
#define SLUICE_PTX_SITE_PARAMETER
#endif
template <>
__device__ __forceinline__ void mma<__nv_bfloat16>(Accumulators& c, const FragmentA& a,
                                                   const FragmentB& b SLUICE_PTX_SITE_PARAMETER) {
  mma_bf16(c, a, b SLUICE_PTX_PASS_SITE);
}
template <>
__device__ __forceinline__ void mma<__half>(Accumulators& c, const FragmentA& a,
                                            const FragmentB& b SLUICE_PTX_SITE_PARAMETER) {
  mma_fp16(c, a, b SLUICE_PTX_PASS_SITE);
}

/// Four 8x8 matrices of 16-bit elements out of shared memory: lane i gives the 16-byte aligned
/// address of row i % 8 of matrix i / 8, and gets in rows[m] elements (g; 2t, 2t+1) of matrix m.
__device__ __forceinline__ void ldmatrix_x4(std::uint32_t (&rows)[4],
                                            const void* row SLUICE_PTX_SITE) {
#if defined(SLUICE_EMULATE)
  ::simt::ldmatrix_x4(rows, row, false, site);
#else
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(rows[0]), "=r"(rows[1]), "=r"(rows[2]), "=r"(rows[3])
               : "r"(static_cast<std::uint32_t>(__cvta_generic_to_shared(row)))
               : "memory");
#endif
}

/// The same, each matrix transposed: rows[m] = elements (2t, 2t+1; g) of matrix m.
__device__ __forceinline__ void ldmatrix_x4_trans(std::uint32_t (&rows)[4],
                                                  const void* row SLUICE_PTX_SITE) {
#if defined(SLUICE_EMULATE)
  ::simt::ldmatrix_x4(rows, row, true, site);
#else
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(rows[0]), "=r"(rows[1]), "=r"(rows[2]), "=r"(rows[3])
               : "r"(static_cast<std::uint32_t>(__cvta_generic_to_shared(row)))
               : "memory");
#endif
}

/// 16 bytes that are read once and that nobody writes while the kernel runs: weights.
__device__ __forceinline__ uint4 load_stream(const void* address SLUICE_PTX_SITE) {
#if defined(SLUICE_EMULATE)
  return ::simt::load_16_bytes(address, site);
#else
  uint4 value;
  asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(value.x), "=r"(value.y), "=r"(value.z), "=r"(value.w)
               : "l"(address));
  return value;
#endif
}

/// Copies `from_bytes` (0 to 16) into 16 bytes of shared memory and fills the rest with zeros,
/// behind the thread's back until `cp_async_wait`. Both addresses 16-byte aligned; `from` must be
/// an address of global memory even where nothing is read.
__device__ __forceinline__ void cp_async16(void* to, const void* from,
                                           int from_bytes = 16 SLUICE_PTX_SITE) {
#if defined(SLUICE_EMULATE)
  ::simt::cp_async_16(to, from, from_bytes, site);
#else
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(
                   static_cast<std::uint32_t>(__cvta_generic_to_shared(to))),
               "l"(from), "r"(from_bytes)
               : "memory");
#endif
}

/// Closes a group of this thread's copies.
__device__ __forceinline__ void cp_async_commit() {
#if defined(SLUICE_EMULATE)
  ::simt::cp_async_commit();
#else
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

/// Waits until at most the newest `kPending` groups of this thread are in flight. Other threads
/// see the copies after a barrier behind it.
template <int kPending>
__device__ __forceinline__ void cp_async_wait() {
#if defined(SLUICE_EMULATE)
  ::simt::cp_async_wait(kPending);
#else
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
#endif
}

/// Waits for the grids ahead in the stream and their writes (programmatic dependent launch; nothing
/// below sm_90, where a grid never starts early). Also legal in a launch that did not ask for it.
__device__ __forceinline__ void grid_dependency_wait(SLUICE_PTX_ONLY_SITE) {
#if defined(SLUICE_EMULATE)
  ::simt::grid_dependency_wait(site);
#elif __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

/// Lets the next grid of the stream start once every block has said so or ended. It orders nothing:
/// the next grid waits by itself.
__device__ __forceinline__ void grid_launch_dependents() {
#if !defined(SLUICE_EMULATE) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

/// Loads that see what another block (gpu) or the host too (sys) released, and the stores for them.
__device__ __forceinline__ std::uint32_t load_acquire_gpu(
    const std::uint32_t* address SLUICE_PTX_SITE) {
#if defined(SLUICE_EMULATE)
  return ::simt::load_acquire(address, site);
#else
  std::uint32_t value;
  asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(value) : "l"(address) : "memory");
  return value;
#endif
}
__device__ __forceinline__ std::uint32_t load_acquire_sys(
    const std::uint32_t* address SLUICE_PTX_SITE) {
#if defined(SLUICE_EMULATE)
  return ::simt::load_acquire(address, site);
#else
  std::uint32_t value;
  asm volatile("ld.acquire.sys.global.u32 %0, [%1];" : "=r"(value) : "l"(address) : "memory");
  return value;
#endif
}
__device__ __forceinline__ void store_release_gpu(std::uint32_t* address,
                                                  std::uint32_t value SLUICE_PTX_SITE) {
#if defined(SLUICE_EMULATE)
  ::simt::store_release(address, value, site);
#else
  asm volatile("st.release.gpu.global.u32 [%0], %1;" ::"l"(address), "r"(value) : "memory");
#endif
}
__device__ __forceinline__ void store_release_sys(std::uint32_t* address,
                                                  std::uint32_t value SLUICE_PTX_SITE) {
#if defined(SLUICE_EMULATE)
  ::simt::store_release(address, value, site);
#else
  asm volatile("st.release.sys.global.u32 [%0], %1;" ::"l"(address), "r"(value) : "memory");
#endif
}

}  // namespace sluice::ptx

#undef SLUICE_PTX_SITE
#undef SLUICE_PTX_ONLY_SITE
#undef SLUICE_PTX_PASS_SITE
#undef SLUICE_PTX_SITE_PARAMETER
