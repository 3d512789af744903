#pragma once

// What kernels find in the global namespace under nvcc and not under g++, and the functions of the
// SIMT core that these and the emulated bodies of kernels/ptx.h call.

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include <vector_functions.h>
#include <vector_types.h>

namespace simt {

/// A place in a kernel, for reports. As a default argument it is the place of the call.
struct Site {
  const char* file = "";
  int line = 0;
  static constexpr Site here(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
    return {file, line};
  }
};

// ---- meeting points ----

enum class Reduction { kNone, kCount, kAnd, kOr };
/// __syncthreads, and with a reduction its three relatives.
int barrier(Reduction reduction, int value, Site site);
void sync_warp(unsigned mask, Site site);

enum class Shuffle { kIndex, kUp, kDown, kXor };
std::uint64_t shuffle(Shuffle kind, unsigned mask, std::uint64_t value, int argument, int width,
                      Site site);
enum class Vote { kBallot, kAny, kAll };
unsigned vote(Vote kind, unsigned mask, bool predicate, Site site);

// ---- memory ----

/// The object of this block under `key`, allocated at the first call: poison, with a gap behind.
void* static_shared(const void* key, const char* name, std::size_t bytes, std::size_t alignment);
[[nodiscard]] unsigned char* dynamic_shared();

template <class T, class Tag>
inline constexpr char shared_key = 0;

/// One object per declaration, template instantiation and block: `Tag` is the type of a lambda
/// written at the declaration.
template <class T, class Tag>
T& shared_object(const char* name, Tag /*tag*/) {
  constexpr std::size_t kAlignment = alignof(T) < 16 ? 16 : alignof(T);
  return *static_cast<T*>(static_shared(&shared_key<T, Tag>, name, sizeof(T), kAlignment));
}

void fence();
/// An atomic access of `bytes` at `address`; `changes` is false when memory stays as it was, which
/// may be a poll and lets others run.
void atomic_access(const void* address, std::size_t bytes, bool changes);
[[nodiscard]] std::uint32_t load_acquire(const std::uint32_t* address, Site site);
void store_release(std::uint32_t* address, std::uint32_t value, Site site);
/// Lets every other thread run first.
void spin();

// ---- instructions of kernels/ptx.h ----

enum class MmaType { kBf16, kFp16 };
void mma_m16n8k16(MmaType type, float (&c)[4], const std::uint32_t (&a)[4],
                  const std::uint32_t (&b)[2], Site site);
void ldmatrix_x4(std::uint32_t (&rows)[4], const void* address, bool transpose, Site site);
[[nodiscard]] uint4 load_16_bytes(const void* address, Site site);
void cp_async_16(void* to, const void* from, int from_bytes, Site site);
void cp_async_commit();
void cp_async_wait(int pending);
void grid_dependency_wait(Site site);

/// dim3 without its constructors, which would make g++ take a constant of it for a variable.
struct Extent {
  unsigned x, y, z;
  operator dim3() const { return {x, y, z}; }  // NOLINT(google-explicit-constructor): as under nvcc
};

}  // namespace simt

// ---- names of CUDA C++ ----

#undef __global__
// A kernel is one function: g++ does not instrument the store of a struct that a call returns, so
// calls must be gone before the checks look (README, "Holes").
#define __global__ __attribute__((flatten))
#undef __launch_bounds__
#define __launch_bounds__(...)
#define SIMT_SITE ::simt::Site site = ::simt::Site::here()

// Constants, so that writing to them fails to compile as it does under nvcc and reading them is
// not instrumented. The objects are in grid.cc, under these assembler names, and are written at
// every switch of threads.
extern const uint3 threadIdx;
extern const uint3 blockIdx;
extern const ::simt::Extent blockDim;
extern const ::simt::Extent gridDim;
inline constexpr int warpSize = 32;

inline void __syncthreads(SIMT_SITE) { ::simt::barrier(::simt::Reduction::kNone, 0, site); }
inline int __syncthreads_count(int predicate, SIMT_SITE) {
  return ::simt::barrier(::simt::Reduction::kCount, predicate, site);
}
inline int __syncthreads_and(int predicate, SIMT_SITE) {
  return ::simt::barrier(::simt::Reduction::kAnd, predicate, site);
}
inline int __syncthreads_or(int predicate, SIMT_SITE) {
  return ::simt::barrier(::simt::Reduction::kOr, predicate, site);
}
inline void __syncwarp(unsigned mask = ~0u, SIMT_SITE) { ::simt::sync_warp(mask, site); }

namespace simt {
template <class T>
T shuffle_value(Shuffle kind, unsigned mask, T value, int argument, int width, Site site) {
  static_assert(sizeof(T) <= 8 && std::is_trivially_copyable_v<T>, "a shuffle moves 1 to 8 bytes");
  std::uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  bits = shuffle(kind, mask, bits, argument, width, site);
  std::memcpy(&value, &bits, sizeof(T));
  return value;
}
}  // namespace simt

template <class T>
T __shfl_sync(unsigned mask, T value, int lane, int width = 32, SIMT_SITE) {
  return ::simt::shuffle_value(::simt::Shuffle::kIndex, mask, value, lane, width, site);
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32, SIMT_SITE) {
  return ::simt::shuffle_value(::simt::Shuffle::kUp, mask, value, static_cast<int>(delta), width,
                               site);
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32, SIMT_SITE) {
  return ::simt::shuffle_value(::simt::Shuffle::kDown, mask, value, static_cast<int>(delta), width,
                               site);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lanes, int width = 32, SIMT_SITE) {
  return ::simt::shuffle_value(::simt::Shuffle::kXor, mask, value, lanes, width, site);
}
inline unsigned __ballot_sync(unsigned mask, int predicate, SIMT_SITE) {
  return ::simt::vote(::simt::Vote::kBallot, mask, predicate != 0, site);
}
inline int __any_sync(unsigned mask, int predicate, SIMT_SITE) {
  return static_cast<int>(::simt::vote(::simt::Vote::kAny, mask, predicate != 0, site));
}
inline int __all_sync(unsigned mask, int predicate, SIMT_SITE) {
  return static_cast<int>(::simt::vote(::simt::Vote::kAll, mask, predicate != 0, site));
}

// A block's fence orders nothing between blocks, which is what the checks are about.
inline void __threadfence_block() {}
inline void __threadfence() { ::simt::fence(); }
inline void __threadfence_system() { ::simt::fence(); }
inline void __nanosleep(unsigned /*ns*/) { ::simt::spin(); }

namespace simt {
// Threads never run at once, so a read and a write make an atomic. Uninstrumented: the checks learn
// of it through atomic_access.
template <class T, class Update>
__attribute__((no_sanitize("thread"))) T atomic_update(T* address, Update update) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8, "atomics are 4 or 8 bytes");
  const T old = *address;
  const T next = update(old);
  atomic_access(address, sizeof(T), std::memcmp(&old, &next, sizeof(T)) != 0);
  const T current = *address;  // others may have run
  *address = update(current);
  return current;
}
}  // namespace simt

template <class T>
T atomicAdd(T* address, std::type_identity_t<T> value) {
  return ::simt::atomic_update(address, [=](T old) { return static_cast<T>(old + value); });
}
template <class T>
T atomicSub(T* address, std::type_identity_t<T> value) {
  return ::simt::atomic_update(address, [=](T old) { return static_cast<T>(old - value); });
}
template <class T>
T atomicExch(T* address, std::type_identity_t<T> value) {
  return ::simt::atomic_update(address, [=](T) { return value; });
}
template <class T>
T atomicMin(T* address, std::type_identity_t<T> value) {
  return ::simt::atomic_update(address, [=](T old) { return value < old ? value : old; });
}
template <class T>
T atomicMax(T* address, std::type_identity_t<T> value) {
  return ::simt::atomic_update(address, [=](T old) { return old < value ? value : old; });
}
template <class T>
T atomicAnd(T* address, std::type_identity_t<T> value) {
  return ::simt::atomic_update(address, [=](T old) { return old & value; });
}
template <class T>
T atomicOr(T* address, std::type_identity_t<T> value) {
  return ::simt::atomic_update(address, [=](T old) { return old | value; });
}
template <class T>
T atomicCAS(T* address, std::type_identity_t<T> expected, std::type_identity_t<T> value) {
  return ::simt::atomic_update(address, [=](T old) { return old == expected ? value : old; });
}

inline int __float_as_int(float value) { return std::bit_cast<int>(value); }
inline unsigned __float_as_uint(float value) { return std::bit_cast<unsigned>(value); }
inline float __int_as_float(int value) { return std::bit_cast<float>(value); }
inline float __uint_as_float(unsigned value) { return std::bit_cast<float>(value); }
inline long long __double_as_longlong(double value) { return std::bit_cast<long long>(value); }
inline double __longlong_as_double(long long value) { return std::bit_cast<double>(value); }

inline int __popc(unsigned value) { return std::popcount(value); }
inline int __popcll(unsigned long long value) { return std::popcount(value); }
inline int __clz(int value) { return std::countl_zero(static_cast<unsigned>(value)); }
inline int __ffs(int value) { return __builtin_ffs(value); }
inline unsigned __brev(unsigned value) {
  unsigned reversed = 0;
  for (int bit = 0; bit < 32; ++bit) reversed |= (value >> bit & 1u) << (31 - bit);
  return reversed;
}
inline unsigned __byte_perm(unsigned low, unsigned high, unsigned selector) {
  const std::uint64_t bytes = static_cast<std::uint64_t>(high) << 32 | low;
  unsigned result = 0;
  for (int i = 0; i < 4; ++i) {
    const unsigned choice = selector >> 4 * i & 15u;
    const unsigned byte = static_cast<unsigned>(bytes >> 8 * (choice & 7u)) & 255u;
    result |= (choice & 8u ? (byte & 128u ? 255u : 0u) : byte) << 8 * i;
  }
  return result;
}
template <class T>
T __ldg(const T* address) {
  return *address;
}

inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __frcp_rn(float a) { return 1.0f / a; }
inline float __fsqrt_rn(float a) { return std::sqrt(a); }
inline int __float2int_rn(float a) { return static_cast<int>(std::nearbyint(a)); }
inline int __float2int_rz(float a) { return static_cast<int>(a); }
inline float __int2float_rn(int a) { return static_cast<float>(a); }

using std::max;
using std::min;
