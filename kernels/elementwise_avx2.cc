#if defined(__x86_64__)

#include <immintrin.h>

#define SLUICE_TIER __attribute__((target("avx2,fma,f16c"), always_inline)) inline
#define SLUICE_ENTRY __attribute__((target("avx2,fma,f16c")))
#include "kernels/elementwise.h"

namespace sluice {
namespace {

struct Avx2 {
  using F = __m256;
  static constexpr std::int64_t kWidth = 8;

  SLUICE_TIER static F set(float v) { return _mm256_set1_ps(v); }
  SLUICE_TIER static F load(const float* p) { return _mm256_loadu_ps(p); }
  SLUICE_TIER static void store(float* p, F v) { _mm256_storeu_ps(p, v); }
  SLUICE_TIER static F load_some(const float* p, std::int64_t count) {
    return _mm256_maskload_ps(p, first_lanes(count));
  }
  SLUICE_TIER static void store_some(float* p, std::int64_t count, F v) {
    _mm256_maskstore_ps(p, first_lanes(count), v);
  }
  SLUICE_TIER static F add(F a, F b) { return _mm256_add_ps(a, b); }
  SLUICE_TIER static F sub(F a, F b) { return _mm256_sub_ps(a, b); }
  SLUICE_TIER static F mul(F a, F b) { return _mm256_mul_ps(a, b); }
  SLUICE_TIER static F div(F a, F b) { return _mm256_div_ps(a, b); }
  SLUICE_TIER static F fma(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }
  SLUICE_TIER static F min(F a, F b) { return _mm256_min_ps(a, b); }
  SLUICE_TIER static F max(F a, F b) { return _mm256_max_ps(a, b); }
  SLUICE_TIER static F ge(F a, F b) { return _mm256_cmp_ps(a, b, _CMP_GE_OQ); }
  SLUICE_TIER static F select(F mask, F yes, F no) { return _mm256_blendv_ps(no, yes, mask); }

  SLUICE_TIER static __m256i bits(F v) { return _mm256_castps_si256(v); }
  SLUICE_TIER static F neg(F v) { return _mm256_xor_ps(v, set(-0.0f)); }
  SLUICE_TIER static F neg_abs(F v) { return _mm256_or_ps(v, set(-0.0f)); }
  SLUICE_TIER static F with_sign_of(F v, F s) {
    return _mm256_or_ps(v, _mm256_and_ps(s, set(-0.0f)));
  }
  SLUICE_TIER static __m256i isub(__m256i a, __m256i b) { return _mm256_sub_epi32(a, b); }
  SLUICE_TIER static __m256i ihalf(__m256i a) { return _mm256_srai_epi32(a, 1); }
  SLUICE_TIER static F exponent(__m256i n) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(n, _mm256_set1_epi32(127)), 23));
  }

 private:
  SLUICE_TIER static __m256i first_lanes(std::int64_t count) {
    return _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(count)),
                              _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
  }
};

SLUICE_TIER __m128i f32_to_bf16(__m256 v) {
  const __m256i bits = _mm256_castps_si256(v);
  const __m256i top = _mm256_srli_epi32(bits, 16);
  const __m256i odd = _mm256_and_si256(top, _mm256_set1_epi32(1));
  const __m256i rounded = _mm256_srli_epi32(
      _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff))), 16);
  const __m256i quiet = _mm256_or_si256(top, _mm256_set1_epi32(0x40));
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
  const __m256i words = _mm256_blendv_epi8(rounded, quiet, nan);
  return _mm_packus_epi32(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
}

SLUICE_ENTRY void gate(const GateSpec& spec, const float* g, const float* u, float* out,
                       std::int64_t count) {
  gate_any<Avx2>(spec, g, u, out, count);
}

SLUICE_ENTRY void accumulate(float weight, const float* row, float* sum, std::int64_t count) {
  accumulate_any<Avx2>(weight, row, sum, count);
}

// The last elements of an array take the scalar definition: its bits are the same.

SLUICE_ENTRY void widen_bf16(const void* in, float* out, std::int64_t count) {
  const auto* from = static_cast<const BFloat16*>(in);
  std::int64_t i = 0;
  for (; i + 8 <= count; i += 8) {
    const __m128i half = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i));
    const __m256i words = _mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16);
    _mm256_storeu_ps(out + i, _mm256_castsi256_ps(words));
  }
  kElementwiseScalar.widen_bf16(from + i, out + i, count - i);
}

SLUICE_ENTRY void widen_f16(const void* in, float* out, std::int64_t count) {
  const auto* from = static_cast<const Float16*>(in);
  std::int64_t i = 0;
  for (; i + 8 <= count; i += 8) {
    const __m128i half = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i));
    _mm256_storeu_ps(out + i, _mm256_cvtph_ps(half));
  }
  kElementwiseScalar.widen_f16(from + i, out + i, count - i);
}

SLUICE_ENTRY void narrow_bf16(const float* in, void* out, std::int64_t count) {
  auto* to = static_cast<BFloat16*>(out);
  std::int64_t i = 0;
  for (; i + 8 <= count; i += 8) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to + i), f32_to_bf16(_mm256_loadu_ps(in + i)));
  }
  kElementwiseScalar.narrow_bf16(in + i, to + i, count - i);
}

SLUICE_ENTRY void narrow_f16(const float* in, void* out, std::int64_t count) {
  auto* to = static_cast<Float16*>(out);
  std::int64_t i = 0;
  for (; i + 8 <= count; i += 8) {
    const __m128i half =
        _mm256_cvtps_ph(_mm256_loadu_ps(in + i), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to + i), half);
  }
  kElementwiseScalar.narrow_f16(in + i, to + i, count - i);
}

}  // namespace

const ElementwiseKernels kElementwiseAvx2 = {
    .gate = gate,
    .accumulate = accumulate,
    .widen_bf16 = widen_bf16,
    .widen_f16 = widen_f16,
    .narrow_bf16 = narrow_bf16,
    .narrow_f16 = narrow_f16,
};

}  // namespace sluice

#endif  // __x86_64__
