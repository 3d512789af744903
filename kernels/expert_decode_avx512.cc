// Dot products of weight rows, AVX-512.
//
// Mapping: one zmm holds the 16 partial sums of one (row, token). Four rows run together, so that
// their chains of fused multiply-adds hide each other's latency and each activation is loaded once
// for four rows.
// Traffic: every weight once, 32 bytes (64 in fp32) per row and step; the activations of up to four
// tokens stay in L1. The same column of the rows after these four is prefetched.
// Numerics: expert_decode.h; a missing column is a zero in both operands.
#if defined(__x86_64__)

#include <immintrin.h>

#include "kernels/tiers.h"

#define SLUICE_TARGET "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl"
#define SLUICE_TIER __attribute__((target(SLUICE_TARGET), always_inline)) inline
#define SLUICE_ENTRY __attribute__((target(SLUICE_TARGET)))

namespace sluice {
namespace {

struct LoadF32 {
  using T = float;
  SLUICE_TIER static __m512 all(const T* p) { return _mm512_loadu_ps(p); }
  SLUICE_TIER static __m512 some(const T* p, __mmask16 mask) {
    return _mm512_maskz_loadu_ps(mask, p);
  }
};

struct LoadBF16 {
  using T = std::uint16_t;
  SLUICE_TIER static __m512 widen(__m256i v) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(v), 16));
  }
  SLUICE_TIER static __m512 all(const T* p) {
    return widen(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  }
  SLUICE_TIER static __m512 some(const T* p, __mmask16 mask) {
    return widen(_mm256_maskz_loadu_epi16(mask, p));
  }
};

struct LoadF16 {
  using T = std::uint16_t;
  SLUICE_TIER static __m512 all(const T* p) {
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  }
  SLUICE_TIER static __m512 some(const T* p, __mmask16 mask) {
    return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(mask, p));
  }
};

SLUICE_TIER float fold(__m512 lanes) {
  const __m256 eight =
      _mm256_add_ps(_mm512_castps512_ps256(lanes), _mm512_extractf32x8_ps(lanes, 1));
  const __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_shuffle_ps(two, two, 1)));
}

template <class Load, int kRows, int kTokens>
SLUICE_TIER void dot_block(const typename Load::T* rows, std::int64_t columns,
                           const float* const* x, __m512 (&sum)[kRows][kTokens]) {
  std::int64_t c = 0;
  for (; c + kLanes <= columns; c += kLanes) {
    __m512 w[kRows];
    for (int r = 0; r < kRows; ++r) {
      const auto* p = rows + r * columns + c;
      w[r] = Load::all(p);
      _mm_prefetch(reinterpret_cast<const char*>(reinterpret_cast<std::uintptr_t>(p) +
                                                 kRows * columns * sizeof(*p)),
                   _MM_HINT_T0);
    }
    for (int t = 0; t < kTokens; ++t) {
      const __m512 v = _mm512_loadu_ps(x[t] + c);
      for (int r = 0; r < kRows; ++r) sum[r][t] = _mm512_fmadd_ps(w[r], v, sum[r][t]);
    }
  }
  if (c == columns) return;
  const auto mask = static_cast<__mmask16>((1u << (columns - c)) - 1u);
  for (int t = 0; t < kTokens; ++t) {
    const __m512 v = _mm512_maskz_loadu_ps(mask, x[t] + c);
    for (int r = 0; r < kRows; ++r) {
      sum[r][t] = _mm512_fmadd_ps(Load::some(rows + r * columns + c, mask), v, sum[r][t]);
    }
  }
}

template <class Load, int kRows, int kTokens>
SLUICE_TIER void dot_step(const DotRowsArgs& args, std::int64_t row, std::int64_t token) {
  __m512 sum[kRows][kTokens];
  for (int r = 0; r < kRows; ++r) {
    for (int t = 0; t < kTokens; ++t) sum[r][t] = _mm512_setzero_ps();
  }
  const auto* rows = static_cast<const typename Load::T*>(args.rows) + row * args.columns;
  dot_block<Load, kRows, kTokens>(rows, args.columns, args.x + token, sum);
  for (int t = 0; t < kTokens; ++t) {
    for (int r = 0; r < kRows; ++r) {
      const float value = fold(sum[r][t]);
      args.out[token + t][row + r] = args.bias == nullptr ? value : value + args.bias[row + r];
    }
  }
}

template <class Load, int kTokens>
SLUICE_TIER void dot_rows_of(const DotRowsArgs& args, std::int64_t token) {
  std::int64_t row = 0;
  for (; row + 4 <= args.num_rows; row += 4) dot_step<Load, 4, kTokens>(args, row, token);
  for (; row < args.num_rows; ++row) dot_step<Load, 1, kTokens>(args, row, token);
}

template <class Load>
SLUICE_ENTRY void dot_rows(const DotRowsArgs& args) {
  std::int64_t token = 0;
  for (; token + 4 <= args.num_tokens; token += 4) dot_rows_of<Load, 4>(args, token);
  switch (args.num_tokens - token) {
    case 3:
      return dot_rows_of<Load, 3>(args, token);
    case 2:
      return dot_rows_of<Load, 2>(args, token);
    case 1:
      return dot_rows_of<Load, 1>(args, token);
    default:
      return;
  }
}

}  // namespace

const DotKernels kDotAvx512 = {
    .f32 = dot_rows<LoadF32>, .bf16 = dot_rows<LoadBF16>, .f16 = dot_rows<LoadF16>};

}  // namespace sluice

#endif  // __x86_64__
