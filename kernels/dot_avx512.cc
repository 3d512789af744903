// Dot products of weight rows, AVX-512.
//
// Mapping: one zmm holds the 16 partial sums of one (row, token). A step takes 32 columns of a row,
// one line of bf16 or fp16, two of fp32. One or two tokens: row by row, the single stream that a
// prefetcher follows at the full rate. More: rows run together, so that the activations, which then
// fill L1 (and more than it, at eight tokens), are read once for all of them.
// Traffic: every weight once. Lines ahead are prefetched into L2; into L1 they would wait for its
// few miss buffers. Rows together and distance were chosen by sluice_kernel_bench at bf16 rows of
// 2048 and 1408 columns. Of a read loop's rate, 1 to 8 tokens, two cores of a Xeon with AMX: 1.09,
// 1.03, 0.98, 0.95, 0.91, 0.86, 0.81, 0.72 (one token at a distance of 1 KiB: 0.82; five to eight
// as two passes over rows in L2: 0.66); one core of an EPYC 9004: 0.97, 0.90, 0.91, 0.64 for 1 to 4
// (one token at 1 KiB; two rows at one token: 0.75).
// Numerics: expert_decode.h; a missing column is a zero in both operands.
#if defined(__x86_64__)

#include <immintrin.h>

#include "kernels/tiers.h"

#define SLUICE_TARGET "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl"
#define SLUICE_TIER __attribute__((target(SLUICE_TARGET), always_inline)) inline
#define SLUICE_ENTRY __attribute__((target(SLUICE_TARGET)))

namespace sluice {
namespace {

/// The two turns of a step: what each type's 32 columns widen to.
struct Turns {
  __m512 first, second;
};

struct LoadF32 {
  using T = float;
  SLUICE_TIER static Turns all(const T* p) { return {_mm512_loadu_ps(p), _mm512_loadu_ps(p + 16)}; }
  SLUICE_TIER static Turns some(const T* p, __mmask32 mask) {
    return {_mm512_maskz_loadu_ps(static_cast<__mmask16>(mask), p),
            _mm512_maskz_loadu_ps(static_cast<__mmask16>(mask >> 16), p + 16)};
  }
};

struct LoadBF16 {
  using T = std::uint16_t;
  SLUICE_TIER static Turns widen(__m512i v) {
    return {_mm512_castsi512_ps(_mm512_slli_epi32(v, 16)),
            _mm512_castsi512_ps(_mm512_and_si512(v, _mm512_set1_epi32(~0xffff)))};
  }
  SLUICE_TIER static Turns all(const T* p) { return widen(_mm512_loadu_si512(p)); }
  SLUICE_TIER static Turns some(const T* p, __mmask32 mask) {
    return widen(_mm512_maskz_loadu_epi16(mask, p));
  }
};

struct LoadF16 {
  using T = std::uint16_t;
  SLUICE_TIER static Turns widen(__m256i low, __m256i high) {
    return {_mm512_cvtph_ps(low), _mm512_cvtph_ps(high)};
  }
  SLUICE_TIER static Turns all(const T* p) {
    return widen(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)),
                 _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p + 16)));
  }
  SLUICE_TIER static Turns some(const T* p, __mmask32 mask) {
    return widen(_mm256_maskz_loadu_epi16(static_cast<__mmask16>(mask), p),
                 _mm256_maskz_loadu_epi16(static_cast<__mmask16>(mask >> 16), p + 16));
  }
};

SLUICE_TIER float fold(__m512 lanes) {
  const __m256 eight =
      _mm256_add_ps(_mm512_castps512_ps256(lanes), _mm512_extractf32x8_ps(lanes, 1));
  const __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_shuffle_ps(two, two, 1)));
}

/// Fetches the lines of a step kAhead bytes past `p`, be they ours or not: a prefetch never faults.
template <std::uintptr_t kAhead, class T>
SLUICE_TIER void prefetch_step(const T* p) {
  for (std::uintptr_t line = 0; line < kStep * sizeof(T); line += 64) {
    const auto address = reinterpret_cast<std::uintptr_t>(p) + kAhead + line;
    _mm_prefetch(reinterpret_cast<const char*>(address), _MM_HINT_T1);
  }
}

template <int kRows, int kTokens>
SLUICE_TIER void add_step(const Turns (&w)[kRows], const float* const* x, std::int64_t column,
                          __m512 (&sum)[kRows][kTokens]) {
  for (int t = 0; t < kTokens; ++t) {
    __m512 first = _mm512_loadu_ps(x[t] + column);
    __m512 second = _mm512_loadu_ps(x[t] + column + kLanes);
    // Kept in registers: GCC would load them again for every row, and loads bind at four tokens.
    asm("" : "+v"(first), "+v"(second));
    for (int r = 0; r < kRows; ++r) sum[r][t] = _mm512_fmadd_ps(w[r].first, first, sum[r][t]);
    for (int r = 0; r < kRows; ++r) sum[r][t] = _mm512_fmadd_ps(w[r].second, second, sum[r][t]);
  }
}

template <class Load, int kRows, std::uintptr_t kAhead, int kTokens>
SLUICE_TIER void dot_block(const DotRowsArgs& args, std::int64_t row) {
  using T = typename Load::T;
  const std::int64_t columns = args.columns;
  const T* rows = static_cast<const T*>(args.rows) + row * columns;
  const float* x[kTokens];
  for (int t = 0; t < kTokens; ++t) x[t] = args.x[t];
  __m512 sum[kRows][kTokens];
  for (int r = 0; r < kRows; ++r) {
    for (int t = 0; t < kTokens; ++t) sum[r][t] = _mm512_setzero_ps();
  }

  Turns w[kRows];
  std::int64_t column = 0;
  for (; column + kStep <= columns; column += kStep) {
    for (int r = 0; r < kRows; ++r) {
      const T* p = rows + r * columns + column;
      prefetch_step<kAhead>(p);
      w[r] = Load::all(p);
    }
    add_step<kRows, kTokens>(w, x, column, sum);
  }
  if (column < columns) {
    const auto mask = static_cast<__mmask32>((std::uint64_t{1} << (columns - column)) - 1);
    for (int r = 0; r < kRows; ++r) w[r] = Load::some(rows + r * columns + column, mask);
    add_step<kRows, kTokens>(w, x, column, sum);
  }
  for (int t = 0; t < kTokens; ++t) {
    for (int r = 0; r < kRows; ++r) {
      const float value = fold(sum[r][t]);
      args.out[t][row + r] = args.bias == nullptr ? value : value + args.bias[row + r];
    }
  }
}

template <class Load, int kTokens, int kRows, std::uintptr_t kAhead>
SLUICE_TIER void dot_rows_of(const DotRowsArgs& args) {
  std::int64_t row = 0;
  for (; row + kRows <= args.num_rows; row += kRows) {
    dot_block<Load, kRows, kAhead, kTokens>(args, row);
  }
  for (; row < args.num_rows; ++row) dot_block<Load, 1, kAhead, kTokens>(args, row);
}

template <class Load>
SLUICE_ENTRY void dot_rows(const DotRowsArgs& args) {
  switch (args.num_tokens) {
    case 1:
      return dot_rows_of<Load, 1, 1, 4096>(args);
    case 2:
      return dot_rows_of<Load, 2, 1, 8192>(args);
    case 3:
      return dot_rows_of<Load, 3, 2, 16384>(args);
    case 4:
      return dot_rows_of<Load, 4, 4, 16384>(args);
    case 5:
      return dot_rows_of<Load, 5, 3, 16384>(args);
    case 6:
      return dot_rows_of<Load, 6, 3, 16384>(args);
    case 7:
      return dot_rows_of<Load, 7, 3, 16384>(args);
    default:
      return dot_rows_of<Load, 8, 3, 16384>(args);
  }
}

}  // namespace

const DotKernels kDotAvx512 = {
    .f32 = dot_rows<LoadF32>, .bf16 = dot_rows<LoadBF16>, .f16 = dot_rows<LoadF16>};

}  // namespace sluice

#endif  // __x86_64__
