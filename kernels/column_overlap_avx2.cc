#if defined(__x86_64__)

#include <immintrin.h>

#include <array>
#include <limits>

#include "kernels/column_overlap_tiers.h"

// Without fma: no compiler may fuse what the scalar tier rounds twice.
#define SLUICE_TIER __attribute__((target("avx2"), always_inline)) inline
#define SLUICE_ENTRY __attribute__((target("avx2")))

namespace sluice {
namespace {

constexpr std::size_t kBlock = ColumnOverlap::kBlock;
constexpr std::size_t kFloats = 8;  // of a register

template <class T>
SLUICE_TIER __m256i load(const T* from) {
  return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
}
template <class T>
SLUICE_TIER void store(T* to, __m256i values) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), values);
}

SLUICE_TIER void add_bytes(std::uint16_t* to, __m128i bytes) {
  store(to, _mm256_add_epi16(load(to), _mm256_cvtepu8_epi16(bytes)));
}

SLUICE_TIER void count_block(const ColumnOverlap& c, std::size_t begin, std::uint8_t* shared) {
  __m256i low = _mm256_setzero_si256();
  __m256i high = _mm256_setzero_si256();
  for (std::size_t k = 0; k < c.num_rows; ++k) {
    low = _mm256_add_epi8(low, load(c.rows[k] + begin));
    high = _mm256_add_epi8(high, load(c.rows[k] + begin + 32));
  }
  store(shared, low);
  store(shared + 32, high);
  std::uint16_t* const overlap = c.overlap + begin;
  add_bytes(overlap, _mm256_castsi256_si128(low));
  add_bytes(overlap + 16, _mm256_extracti128_si256(low, 1));
  add_bytes(overlap + 32, _mm256_castsi256_si128(high));
  add_bytes(overlap + 48, _mm256_extracti128_si256(high, 1));
}

}  // namespace

SLUICE_ENTRY void count_overlap_avx2(const ColumnOverlap& c) {
  alignas(32) std::array<std::uint8_t, kBlock> shared;
  for (std::size_t begin = 0; begin < c.num_columns; begin += kBlock) {
    count_block(c, begin, shared.data());
  }
}

SLUICE_ENTRY void compare_columns_avx2(const ColumnOverlap& c, const ColumnSimilarity& s) {
  alignas(32) std::array<std::uint8_t, kBlock> shared;
  alignas(32) std::array<float, kFloats> lanes;
  const __m256 fade = _mm256_set1_ps(s.fade);
  const __m256 each = _mm256_set1_ps(s.each);
  const __m256 by = _mm256_set1_ps(s.by);
  for (std::size_t begin = 0; begin < c.num_columns; begin += kBlock) {
    count_block(c, begin, shared.data());
    __m256 best = _mm256_set1_ps(-std::numeric_limits<float>::infinity());
    for (std::size_t i = 0; i < kBlock; i += kFloats) {
      const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(shared.data() + i));
      const __m256 in_common = _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(bytes));
      float* const at = s.faded + begin + i;
      const __m256 faded =
          _mm256_add_ps(_mm256_mul_ps(_mm256_loadu_ps(at), fade), _mm256_mul_ps(in_common, each));
      _mm256_storeu_ps(at, faded);
      const __m256 likely =
          _mm256_add_ps(_mm256_loadu_ps(s.base + begin + i), _mm256_mul_ps(faded, by));
      best = _mm256_max_ps(best, likely);
    }
    _mm256_store_ps(lanes.data(), best);
    float most = lanes[0];
    for (const float lane : lanes) most = lane > most ? lane : most;
    s.best_of_block[begin / kBlock] = most;
  }
}

}  // namespace sluice

#endif
