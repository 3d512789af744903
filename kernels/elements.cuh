#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "base/dtype.h"
#include "kernels/ptx.h"

// Element types in registers, by the storage types of base/dtype.h: what those hold on the host,
// with the same bits.

namespace sluice::device {

__device__ __forceinline__ float widen(float value) { return value; }
__device__ __forceinline__ float widen(BFloat16 value) {
  return __uint_as_float(static_cast<std::uint32_t>(value.bits) << 16);
}
__device__ __forceinline__ float widen(Float16 value) {
  __half_raw raw;
  raw.x = value.bits;
  return __half2float(__half(raw));
}

/// Rounds to nearest even. (Bits go through integers: a returned struct that is stored at once is a
/// store that the emulation's checks do not see.)
template <class T>
__device__ __forceinline__ T narrow(float value);
template <>
__device__ __forceinline__ float narrow<float>(float value) {
  return value;
}
template <>
__device__ __forceinline__ BFloat16 narrow<BFloat16>(float value) {
  const __nv_bfloat16_raw raw = __float2bfloat16_rn(value);
  return {raw.x};
}
template <>
__device__ __forceinline__ Float16 narrow<Float16>(float value) {
  const __half_raw raw = __float2half_rn(value);
  return {raw.x};
}

/// Stores a rounded value.
template <class T>
__device__ __forceinline__ void store_narrow(T* address, float value) {
  if constexpr (sizeof(T) == 4) {
    *address = value;
  } else {
    const std::uint16_t bits = narrow<T>(value).bits;
    address->bits = bits;
  }
}

/// Elements of 16 bytes, widened. `kCount` = 4 of fp32, 8 of the half types.
template <class T>
inline constexpr int kPerLoad = 16 / static_cast<int>(sizeof(T));

template <class T>
__device__ __forceinline__ void widen_load(const uint4& load, float (&values)[kPerLoad<T>]) {
  const std::uint32_t words[4] = {load.x, load.y, load.z, load.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if constexpr (sizeof(T) == 4) {
      values[i] = __uint_as_float(words[i]);
    } else {
      values[2 * i] = widen(T{static_cast<std::uint16_t>(words[i])});
      values[2 * i + 1] = widen(T{static_cast<std::uint16_t>(words[i] >> 16)});
    }
  }
}

template <class T>
__device__ __forceinline__ void multiply_add(ptx::Accumulators& c, const ptx::FragmentA& a,
                                             const ptx::FragmentB& b);
template <>
__device__ __forceinline__ void multiply_add<BFloat16>(ptx::Accumulators& c,
                                                       const ptx::FragmentA& a,
                                                       const ptx::FragmentB& b) {
  ptx::mma_bf16(c, a, b);
}
template <>
__device__ __forceinline__ void multiply_add<Float16>(ptx::Accumulators& c, const ptx::FragmentA& a,
                                                      const ptx::FragmentB& b) {
  ptx::mma_fp16(c, a, b);
}

/// A routing weight that is not zero: of either sign, NaN counts as a weight (engine/grouping.h).
template <class T>
__device__ __forceinline__ bool is_nonzero(T weight) {
  return widen(weight) != 0.0f;
}

}  // namespace sluice::device
