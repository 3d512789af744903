#include "kernels/column_overlap.h"

#include <algorithm>
#include <array>
#include <limits>

#include "kernels/column_overlap_tiers.h"
#include "kernels/cpu_isa.h"

namespace sluice {
namespace {

constexpr std::size_t kBlock = ColumnOverlap::kBlock;

void count_block(const ColumnOverlap& c, std::size_t begin,
                 std::array<std::uint8_t, kBlock>& shared) {
  shared.fill(0);
  for (std::size_t k = 0; k < c.num_rows; ++k) {
    for (std::size_t i = 0; i < kBlock; ++i) {
      shared[i] = static_cast<std::uint8_t>(shared[i] + c.rows[k][begin + i]);
    }
  }
  for (std::size_t i = 0; i < kBlock; ++i) {
    c.overlap[begin + i] = static_cast<std::uint16_t>(c.overlap[begin + i] + shared[i]);
  }
}

}  // namespace

void count_overlap_scalar(const ColumnOverlap& c) {
  std::array<std::uint8_t, kBlock> shared;
  for (std::size_t begin = 0; begin < c.num_columns; begin += kBlock) count_block(c, begin, shared);
}

void compare_columns_scalar(const ColumnOverlap& c, const ColumnSimilarity& s) {
  std::array<std::uint8_t, kBlock> shared;
  for (std::size_t begin = 0; begin < c.num_columns; begin += kBlock) {
    count_block(c, begin, shared);
    float best = -std::numeric_limits<float>::infinity();
    for (std::size_t i = 0; i < kBlock; ++i) {
      float& faded = s.faded[begin + i];
      faded = faded * s.fade + static_cast<float>(shared[i]) * s.each;
      best = std::max(best, s.base[begin + i] + faded * s.by);
    }
    s.best_of_block[begin / kBlock] = best;
  }
}

void count_overlap(const ColumnOverlap& columns) {
#if defined(__x86_64__)
  if (cpu_isa() != CpuIsa::kScalar) return count_overlap_avx2(columns);
#endif
  count_overlap_scalar(columns);
}

void compare_columns(const ColumnOverlap& columns, const ColumnSimilarity& similarity) {
#if defined(__x86_64__)
  if (cpu_isa() != CpuIsa::kScalar) return compare_columns_avx2(columns, similarity);
#endif
  compare_columns_scalar(columns, similarity);
}

}  // namespace sluice
