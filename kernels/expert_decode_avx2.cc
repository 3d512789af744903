// Dot products of weight rows, AVX2 + FMA + F16C.
//
// Mapping: two ymm hold the 16 partial sums of one (row, token); rows and tokens that run together
// are as many as 16 registers carry. Traffic and numerics as in expert_decode_avx512.cc.
#if defined(__x86_64__)

#include <immintrin.h>

#include <cstring>

#include "kernels/tiers.h"

#define SLUICE_TARGET "avx2,fma,f16c"
#define SLUICE_TIER __attribute__((target(SLUICE_TARGET), always_inline)) inline
#define SLUICE_ENTRY __attribute__((target(SLUICE_TARGET)))

namespace sluice {
namespace {

constexpr int kHalves = 2;  // registers per 16 lanes

struct LoadF32 {
  using T = float;
  SLUICE_TIER static __m256 eight(const T* p) { return _mm256_loadu_ps(p); }
};

struct LoadBF16 {
  using T = std::uint16_t;
  SLUICE_TIER static __m256 eight(const T* p) {
    const __m128i half = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16));
  }
};

struct LoadF16 {
  using T = std::uint16_t;
  SLUICE_TIER static __m256 eight(const T* p) {
    return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  }
};

SLUICE_TIER float fold(__m256 low, __m256 high) {
  const __m256 eight = _mm256_add_ps(low, high);
  const __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_shuffle_ps(two, two, 1)));
}

/// One step of 16 columns: sum[r][t] += row r · x[t], rows `stride` elements apart.
template <class Load, int kRows, int kTokens>
SLUICE_TIER void dot_columns(const typename Load::T* rows, std::int64_t stride,
                             const float* const (&x)[kTokens],
                             __m256 (&sum)[kRows][kTokens][kHalves]) {
  for (int h = 0; h < kHalves; ++h) {
    __m256 w[kRows];
    for (int r = 0; r < kRows; ++r) w[r] = Load::eight(rows + r * stride + 8 * h);
    for (int t = 0; t < kTokens; ++t) {
      const __m256 v = _mm256_loadu_ps(x[t] + 8 * h);
      for (int r = 0; r < kRows; ++r) sum[r][t][h] = _mm256_fmadd_ps(w[r], v, sum[r][t][h]);
    }
  }
}

template <class Load, int kRows, int kTokens>
SLUICE_TIER void dot_step(const DotRowsArgs& args, std::int64_t row, std::int64_t token) {
  using T = typename Load::T;
  const std::int64_t columns = args.columns;
  const T* rows = static_cast<const T*>(args.rows) + row * columns;
  __m256 sum[kRows][kTokens][kHalves];
  for (int r = 0; r < kRows; ++r) {
    for (int t = 0; t < kTokens; ++t) sum[r][t][0] = sum[r][t][1] = _mm256_setzero_ps();
  }
  const float* x[kTokens];
  std::int64_t c = 0;
  for (; c + kLanes <= columns; c += kLanes) {
    for (int r = 0; r < kRows; ++r) {
      _mm_prefetch(
          reinterpret_cast<const char*>(reinterpret_cast<std::uintptr_t>(rows + r * columns + c) +
                                        kRows * columns * sizeof(T)),
          _MM_HINT_T0);
    }
    for (int t = 0; t < kTokens; ++t) x[t] = args.x[token + t] + c;
    dot_columns<Load, kRows, kTokens>(rows + c, columns, x, sum);
  }
  if (c < columns) {  // the last columns, with zeros behind them
    const auto rest = static_cast<std::size_t>(columns - c);
    T last_rows[kRows][kLanes] = {};
    float last_x[kTokens][kLanes] = {};
    for (int r = 0; r < kRows; ++r) {
      std::memcpy(last_rows[r], rows + r * columns + c, rest * sizeof(T));
    }
    for (int t = 0; t < kTokens; ++t) {
      std::memcpy(last_x[t], args.x[token + t] + c, rest * sizeof(float));
      x[t] = last_x[t];
    }
    dot_columns<Load, kRows, kTokens>(last_rows[0], kLanes, x, sum);
  }
  for (int t = 0; t < kTokens; ++t) {
    for (int r = 0; r < kRows; ++r) {
      const float value = fold(sum[r][t][0], sum[r][t][1]);
      args.out[token + t][row + r] = args.bias == nullptr ? value : value + args.bias[row + r];
    }
  }
}

template <class Load, int kRows, int kTokens>
SLUICE_TIER void dot_rows_of(const DotRowsArgs& args, std::int64_t token) {
  std::int64_t row = 0;
  for (; row + kRows <= args.num_rows; row += kRows)
    dot_step<Load, kRows, kTokens>(args, row, token);
  for (; row < args.num_rows; ++row) dot_step<Load, 1, kTokens>(args, row, token);
}

template <class Load>
SLUICE_ENTRY void dot_rows(const DotRowsArgs& args) {
  std::int64_t token = 0;
  for (; token + 4 <= args.num_tokens; token += 4) dot_rows_of<Load, 1, 4>(args, token);
  switch (args.num_tokens - token) {
    case 3:
      return dot_rows_of<Load, 2, 3>(args, token);
    case 2:
      return dot_rows_of<Load, 2, 2>(args, token);
    case 1:
      return dot_rows_of<Load, 4, 1>(args, token);
    default:
      return;
  }
}

}  // namespace

const DotKernels kDotAvx2 = {
    .f32 = dot_rows<LoadF32>, .bf16 = dot_rows<LoadBF16>, .f16 = dot_rows<LoadF16>};

}  // namespace sluice

#endif  // __x86_64__
