#include <bit>
#include <cmath>

#define SLUICE_TIER inline
#include "kernels/elementwise.h"

namespace sluice {
namespace {

struct Scalar {
  using F = float;
  static constexpr std::int64_t kWidth = 1;

  static F set(float v) { return v; }
  static F load(const float* p) { return *p; }
  static void store(float* p, F v) { *p = v; }
  static F load_some(const float* p, std::int64_t) { return *p; }
  static void store_some(float* p, std::int64_t, F v) { *p = v; }
  static F add(F a, F b) { return a + b; }
  static F sub(F a, F b) { return a - b; }
  static F mul(F a, F b) { return a * b; }
  static F div(F a, F b) { return a / b; }
  static F fma(F a, F b, F c) { return std::fma(a, b, c); }
  static F min(F a, F b) { return a < b ? a : b; }
  static F max(F a, F b) { return a > b ? a : b; }
  static bool ge(F a, F b) { return a >= b; }
  static F select(bool mask, F yes, F no) { return mask ? yes : no; }

  static std::int32_t bits(F v) { return std::bit_cast<std::int32_t>(v); }
  static F from_bits(std::uint32_t v) { return std::bit_cast<float>(v); }
  static F neg(F v) { return from_bits(std::bit_cast<std::uint32_t>(v) ^ 0x80000000u); }
  static F neg_abs(F v) { return from_bits(std::bit_cast<std::uint32_t>(v) | 0x80000000u); }
  /// `v` (not negative) with the sign of `s`.
  static F with_sign_of(F v, F s) {
    return from_bits(std::bit_cast<std::uint32_t>(v) |
                     (std::bit_cast<std::uint32_t>(s) & 0x80000000u));
  }
  static std::int32_t isub(std::int32_t a, std::int32_t b) {
    return static_cast<std::int32_t>(static_cast<std::uint32_t>(a) - static_cast<std::uint32_t>(b));
  }
  static std::int32_t ihalf(std::int32_t a) { return a >> 1; }
  /// 2^n
  static F exponent(std::int32_t n) {
    return from_bits((static_cast<std::uint32_t>(n) + 127u) << 23);
  }
};

template <class T>
void widen_elements(const void* in, float* out, std::int64_t count) {
  const T* elements = static_cast<const T*>(in);
  for (std::int64_t i = 0; i < count; ++i) out[i] = to_float(elements[i]);
}

template <class T>
void narrow_elements(const float* in, void* out, std::int64_t count) {
  T* elements = static_cast<T*>(out);
  for (std::int64_t i = 0; i < count; ++i) elements[i] = from_float<T>(in[i]);
}

}  // namespace

const ElementwiseKernels kElementwiseScalar = {
    .gate = gate_any<Scalar>,
    .accumulate = accumulate_any<Scalar>,
    .widen_bf16 = widen_elements<BFloat16>,
    .widen_f16 = widen_elements<Float16>,
    .narrow_bf16 = narrow_elements<BFloat16>,
    .narrow_f16 = narrow_elements<Float16>,
};

}  // namespace sluice
