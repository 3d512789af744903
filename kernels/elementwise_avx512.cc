#if defined(__x86_64__)

#include <immintrin.h>

#define SLUICE_TIER \
  __attribute__((target("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl"), always_inline)) inline
#define SLUICE_ENTRY __attribute__((target("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl")))
#include "kernels/elementwise.h"

namespace sluice {
namespace {

SLUICE_TIER __mmask16 first_lanes(std::int64_t count) {
  return static_cast<__mmask16>((1u << count) - 1u);
}

struct Avx512 {
  using F = __m512;
  static constexpr std::int64_t kWidth = 16;

  SLUICE_TIER static F set(float v) { return _mm512_set1_ps(v); }
  SLUICE_TIER static F load(const float* p) { return _mm512_loadu_ps(p); }
  SLUICE_TIER static void store(float* p, F v) { _mm512_storeu_ps(p, v); }
  SLUICE_TIER static F load_some(const float* p, std::int64_t count) {
    return _mm512_maskz_loadu_ps(first_lanes(count), p);
  }
  SLUICE_TIER static void store_some(float* p, std::int64_t count, F v) {
    _mm512_mask_storeu_ps(p, first_lanes(count), v);
  }
  SLUICE_TIER static F add(F a, F b) { return _mm512_add_ps(a, b); }
  SLUICE_TIER static F sub(F a, F b) { return _mm512_sub_ps(a, b); }
  SLUICE_TIER static F mul(F a, F b) { return _mm512_mul_ps(a, b); }
  SLUICE_TIER static F div(F a, F b) { return _mm512_div_ps(a, b); }
  SLUICE_TIER static F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
  SLUICE_TIER static F min(F a, F b) { return _mm512_min_ps(a, b); }
  SLUICE_TIER static F max(F a, F b) { return _mm512_max_ps(a, b); }
  SLUICE_TIER static __mmask16 ge(F a, F b) { return _mm512_cmp_ps_mask(a, b, _CMP_GE_OQ); }
  SLUICE_TIER static F select(__mmask16 mask, F yes, F no) {
    return _mm512_mask_blend_ps(mask, no, yes);
  }

  SLUICE_TIER static __m512i bits(F v) { return _mm512_castps_si512(v); }
  SLUICE_TIER static F neg(F v) {
    return _mm512_castsi512_ps(_mm512_xor_si512(bits(v), sign_bit()));
  }
  SLUICE_TIER static F neg_abs(F v) {
    return _mm512_castsi512_ps(_mm512_or_si512(bits(v), sign_bit()));
  }
  SLUICE_TIER static F with_sign_of(F v, F s) {
    return _mm512_castsi512_ps(_mm512_or_si512(bits(v), _mm512_and_si512(bits(s), sign_bit())));
  }
  SLUICE_TIER static __m512i isub(__m512i a, __m512i b) { return _mm512_sub_epi32(a, b); }
  SLUICE_TIER static __m512i ihalf(__m512i a) { return _mm512_srai_epi32(a, 1); }
  SLUICE_TIER static F exponent(__m512i n) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_add_epi32(n, _mm512_set1_epi32(127)), 23));
  }

 private:
  SLUICE_TIER static __m512i sign_bit() { return _mm512_set1_epi32(INT32_MIN); }
};

SLUICE_TIER __m512 bf16_to_f32(__m256i v) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(v), 16));
}

SLUICE_TIER __m256i f32_to_bf16(__m512 v) {
  const __m512i bits = _mm512_castps_si512(v);
  const __m512i top = _mm512_srli_epi32(bits, 16);
  const __m512i odd = _mm512_and_si512(top, _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_srli_epi32(
      _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff))), 16);
  const __m512i quiet = _mm512_or_si512(top, _mm512_set1_epi32(0x40));
  const __mmask16 nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
  return _mm512_cvtepi32_epi16(_mm512_mask_blend_epi32(nan, rounded, quiet));
}

SLUICE_ENTRY void gate(const GateSpec& spec, const float* g, const float* u, float* out,
                       std::int64_t count) {
  gate_any<Avx512>(spec, g, u, out, count);
}

SLUICE_ENTRY void accumulate(float weight, const float* row, float* sum, std::int64_t count) {
  accumulate_any<Avx512>(weight, row, sum, count);
}

SLUICE_ENTRY void widen_bf16(const void* in, float* out, std::int64_t count) {
  const auto* from = static_cast<const std::uint16_t*>(in);
  for (std::int64_t i = 0; i < count; i += 16) {
    const __mmask16 mask = first_lanes(std::min<std::int64_t>(16, count - i));
    _mm512_mask_storeu_ps(out + i, mask, bf16_to_f32(_mm256_maskz_loadu_epi16(mask, from + i)));
  }
}

SLUICE_ENTRY void widen_f16(const void* in, float* out, std::int64_t count) {
  const auto* from = static_cast<const std::uint16_t*>(in);
  for (std::int64_t i = 0; i < count; i += 16) {
    const __mmask16 mask = first_lanes(std::min<std::int64_t>(16, count - i));
    _mm512_mask_storeu_ps(out + i, mask, _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(mask, from + i)));
  }
}

SLUICE_ENTRY void narrow_bf16(const float* in, void* out, std::int64_t count) {
  auto* to = static_cast<std::uint16_t*>(out);
  for (std::int64_t i = 0; i < count; i += 16) {
    const __mmask16 mask = first_lanes(std::min<std::int64_t>(16, count - i));
    _mm256_mask_storeu_epi16(to + i, mask, f32_to_bf16(_mm512_maskz_loadu_ps(mask, in + i)));
  }
}

SLUICE_ENTRY void narrow_f16(const float* in, void* out, std::int64_t count) {
  auto* to = static_cast<std::uint16_t*>(out);
  for (std::int64_t i = 0; i < count; i += 16) {
    const __mmask16 mask = first_lanes(std::min<std::int64_t>(16, count - i));
    const __m512 v = _mm512_maskz_loadu_ps(mask, in + i);
    _mm256_mask_storeu_epi16(to + i, mask,
                             _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
  }
}

}  // namespace

const ElementwiseKernels kElementwiseAvx512 = {
    .gate = gate,
    .accumulate = accumulate,
    .widen_bf16 = widen_bf16,
    .widen_f16 = widen_f16,
    .narrow_bf16 = narrow_bf16,
    .narrow_f16 = narrow_f16,
};

}  // namespace sluice

#endif  // __x86_64__
