#pragma once

#include <cstdint>

#include "kernels/gate.h"

#define SLUICE_TIER __device__ __forceinline__
#include "kernels/elementwise.h"

// The gate functions on a GPU: the definition of elementwise.h over one fp32 value. Only operations
// that IEEE 754 fixes, so a GPU gives the bits of the CPU's tiers, provided that nothing contracts
// a multiplication and an addition (-fmad=false) or flushes subnormals.

namespace sluice::device {

/// What elementwise.h asks of a vector, for a thread.
struct GateScalar {
  using F = float;
  static constexpr std::int64_t kWidth = 1;

  static __device__ __forceinline__ F set(float v) { return v; }
  static __device__ __forceinline__ F add(F a, F b) { return a + b; }
  static __device__ __forceinline__ F sub(F a, F b) { return a - b; }
  static __device__ __forceinline__ F mul(F a, F b) { return a * b; }
  static __device__ __forceinline__ F div(F a, F b) { return a / b; }
  static __device__ __forceinline__ F fma(F a, F b, F c) { return __fmaf_rn(a, b, c); }
  static __device__ __forceinline__ F min(F a, F b) { return a < b ? a : b; }
  static __device__ __forceinline__ F max(F a, F b) { return a > b ? a : b; }
  static __device__ __forceinline__ bool ge(F a, F b) { return a >= b; }
  static __device__ __forceinline__ F select(bool mask, F yes, F no) { return mask ? yes : no; }

  static __device__ __forceinline__ std::int32_t bits(F v) { return __float_as_int(v); }
  static __device__ __forceinline__ F neg(F v) {
    return __uint_as_float(__float_as_uint(v) ^ 0x80000000u);
  }
  static __device__ __forceinline__ F neg_abs(F v) {
    return __uint_as_float(__float_as_uint(v) | 0x80000000u);
  }
  static __device__ __forceinline__ F with_sign_of(F v, F s) {
    return __uint_as_float(__float_as_uint(v) | (__float_as_uint(s) & 0x80000000u));
  }
  static __device__ __forceinline__ std::int32_t isub(std::int32_t a, std::int32_t b) {
    return static_cast<std::int32_t>(static_cast<std::uint32_t>(a) - static_cast<std::uint32_t>(b));
  }
  static __device__ __forceinline__ std::int32_t ihalf(std::int32_t a) { return a >> 1; }
  static __device__ __forceinline__ F exponent(std::int32_t n) {
    return __uint_as_float((static_cast<std::uint32_t>(n) + 127u) << 23);
  }
};

/// gate(g, u) of a kind that has a gate.
__device__ __forceinline__ float gate_pair(const GateSpec& spec, float g, float u) {
  switch (spec.kind) {
    case GateKind::kSilu:
      return gate_value<GateScalar, GateKind::kSilu>(spec, g, u);
    case GateKind::kGelu:
      return gate_value<GateScalar, GateKind::kGelu>(spec, g, u);
    case GateKind::kGeluTanh:
      return gate_value<GateScalar, GateKind::kGeluTanh>(spec, g, u);
    case GateKind::kClampedSilu:
      return gate_value<GateScalar, GateKind::kClampedSilu>(spec, g, u);
    case GateKind::kOaiSwiglu:
      return gate_value<GateScalar, GateKind::kOaiSwiglu>(spec, g, u);
    case GateKind::kRelu:
      return gate_value<GateScalar, GateKind::kRelu>(spec, g, u);
    default:
      return u;  // refused by the plans
  }
}

/// gate(u) of a kind that has none.
__device__ __forceinline__ float gate_single(const GateSpec& spec, float u) {
  switch (spec.kind) {
    case GateKind::kRelu2:
      return gate_value<GateScalar, GateKind::kRelu2>(spec, u, u);
    case GateKind::kSiluOnly:
      return gate_value<GateScalar, GateKind::kSiluOnly>(spec, u, u);
    case GateKind::kGeluOnly:
      return gate_value<GateScalar, GateKind::kGeluOnly>(spec, u, u);
    case GateKind::kReluOnly:
      return gate_value<GateScalar, GateKind::kReluOnly>(spec, u, u);
    default:
      return u;
  }
}

}  // namespace sluice::device
