// Dot products of weight rows, AVX2 + FMA + F16C.
//
// Mapping: two ymm hold the 16 partial sums of one (row, token); 16 registers carry four tokens of
// one row. A step takes 32 columns, as 16 + 16 (fp32, fp16) or even + odd (bf16).
// Traffic and numerics as in dot_avx512.cc.
#if defined(__x86_64__)

#include <immintrin.h>

#include <cstring>

#include "kernels/tiers.h"

#define SLUICE_TARGET "avx2,fma,f16c"
#define SLUICE_TIER __attribute__((target(SLUICE_TARGET), always_inline)) inline
#define SLUICE_ENTRY __attribute__((target(SLUICE_TARGET)))

namespace sluice {
namespace {

constexpr int kHalves = 2;  // registers per 16 partial sums

/// The two turns of eight partial sums in one step.
struct Turns {
  __m256 first, second;
};

struct LoadF32 {
  using T = float;
  SLUICE_TIER static Turns half(const T* p, int h) {
    return {_mm256_loadu_ps(p + 8 * h), _mm256_loadu_ps(p + 16 + 8 * h)};
  }
};

struct LoadBF16 {
  using T = std::uint16_t;
  SLUICE_TIER static Turns half(const T* p, int h) {
    const __m256i v = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p + 16 * h));
    return {_mm256_castsi256_ps(_mm256_slli_epi32(v, 16)),
            _mm256_castsi256_ps(_mm256_and_si256(v, _mm256_set1_epi32(~0xffff)))};
  }
};

struct LoadF16 {
  using T = std::uint16_t;
  SLUICE_TIER static __m256 eight(const T* p) {
    return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  }
  SLUICE_TIER static Turns half(const T* p, int h) {
    return {eight(p + 8 * h), eight(p + 16 + 8 * h)};
  }
};

SLUICE_TIER float fold(const __m256 (&sum)[kHalves]) {
  const __m256 eight = _mm256_add_ps(sum[0], sum[1]);
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

/// One step of rows that lie `stride` elements apart.
template <class Load, int kRows, int kTokens>
SLUICE_TIER void add_step(const typename Load::T* rows, std::int64_t stride, const float* const* x,
                          std::int64_t column, __m256 (&sum)[kRows][kTokens][kHalves]) {
  for (int h = 0; h < kHalves; ++h) {
    Turns w[kRows];
    for (int r = 0; r < kRows; ++r) w[r] = Load::half(rows + r * stride, h);
    for (int t = 0; t < kTokens; ++t) {
      const __m256 first = _mm256_loadu_ps(x[t] + column + 8 * h);
      const __m256 second = _mm256_loadu_ps(x[t] + column + kLanes + 8 * h);
      for (int r = 0; r < kRows; ++r) {
        sum[r][t][h] = _mm256_fmadd_ps(w[r].first, first, sum[r][t][h]);
        sum[r][t][h] = _mm256_fmadd_ps(w[r].second, second, sum[r][t][h]);
      }
    }
  }
}

template <class Load, int kRows, std::uintptr_t kAhead, int kTokens>
SLUICE_TIER void dot_block(const DotRowsArgs& args, std::int64_t row) {
  using T = typename Load::T;
  const std::int64_t columns = args.columns;
  const T* rows = static_cast<const T*>(args.rows) + row * columns;
  const float* x[kTokens];
  for (int t = 0; t < kTokens; ++t) x[t] = args.x[t];
  __m256 sum[kRows][kTokens][kHalves];
  for (int r = 0; r < kRows; ++r) {
    for (int t = 0; t < kTokens; ++t) sum[r][t][0] = sum[r][t][1] = _mm256_setzero_ps();
  }

  std::int64_t column = 0;
  for (; column + kStep <= columns; column += kStep) {
    for (int r = 0; r < kRows; ++r) prefetch_step<kAhead>(rows + r * columns + column);
    add_step<Load, kRows, kTokens>(rows + column, columns, x, column, sum);
  }
  if (column < columns) {
    T last[kRows][kStep] = {};
    for (int r = 0; r < kRows; ++r) {
      std::memcpy(last[r], rows + r * columns + column,
                  static_cast<std::size_t>(columns - column) * sizeof(T));
    }
    add_step<Load, kRows, kTokens>(last[0], kStep, x, column, sum);
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
  // More than four tokens take turns over the same rows, which are in L2 by then.
  for (DotRowsArgs turn = args; turn.num_tokens > 0;
       turn.num_tokens -= 4, turn.x += 4, turn.out += 4) {
    switch (turn.num_tokens) {
      case 1:
        dot_rows_of<Load, 1, 1, 4096>(turn);
        break;
      case 2:
        dot_rows_of<Load, 2, 1, 8192>(turn);
        break;
      case 3:
        dot_rows_of<Load, 3, 1, 16384>(turn);
        break;
      default:
        dot_rows_of<Load, 4, 1, 16384>(turn);
    }
  }
}

}  // namespace

const DotKernels kDotAvx2 = {
    .f32 = dot_rows<LoadF32>, .bf16 = dot_rows<LoadBF16>, .f16 = dot_rows<LoadF16>};

}  // namespace sluice

#endif  // __x86_64__
