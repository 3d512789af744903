#include "kernels/column_overlap.h"

#include <gtest/gtest.h>

#include <limits>
#include <random>
#include <vector>

#include "kernels/column_overlap_tiers.h"
#include "kernels/cpu_isa.h"
#include "support/seed.h"

namespace sluice {
namespace {

constexpr std::size_t kBlock = ColumnOverlap::kBlock;

struct Data {
  std::vector<std::vector<std::uint8_t>> bytes;
  std::vector<const std::uint8_t*> rows;
  std::vector<std::uint16_t> overlap;
  std::vector<float> base;
  std::vector<float> faded;
  std::vector<float> best;

  Data(std::size_t num_rows, std::size_t num_columns)
      : bytes(num_rows, std::vector<std::uint8_t>(num_columns)),
        overlap(num_columns),
        base(num_columns),
        faded(num_columns),
        best(num_columns / kBlock) {
    std::mt19937_64 rng(testing::test_seed());
    for (auto& row : bytes) {
      for (std::uint8_t& each : row) each = rng() % 3 == 0;
      rows.push_back(row.data());
    }
    for (std::size_t c = 0; c < num_columns; ++c) {
      overlap[c] = static_cast<std::uint16_t>(rng() % 300);
      base[c] = rng() % 5 == 0 ? -std::numeric_limits<float>::infinity()
                               : static_cast<float>(rng() % 1000) / 77;
      faded[c] = static_cast<float>(rng() % 1000) / 333;
    }
  }
  [[nodiscard]] ColumnOverlap columns() {
    return {.rows = rows.data(),
            .num_rows = rows.size(),
            .num_columns = overlap.size(),
            .overlap = overlap.data()};
  }
  [[nodiscard]] ColumnSimilarity similarity() {
    return {.base = base.data(),
            .faded = faded.data(),
            .best_of_block = best.data(),
            .fade = 0.85F,
            .each = 0.25F,
            .by = 7.3F};
  }
};

TEST(ColumnOverlap, CountsAndComparesByItsDefinition) {
  for (const std::size_t num_rows : {0, 1, 4, 255}) {
    Data data(num_rows, 3 * kBlock);
    const Data before = data;
    compare_columns(data.columns(), data.similarity());
    for (std::size_t block = 0; block < 3; ++block) {
      float most = -std::numeric_limits<float>::infinity();
      for (std::size_t c = block * kBlock; c < (block + 1) * kBlock; ++c) {
        int in_common = 0;
        for (const auto& row : data.bytes) in_common += row[c];
        ASSERT_EQ(data.overlap[c], before.overlap[c] + in_common);
        const float expected = before.faded[c] * 0.85F + static_cast<float>(in_common) * 0.25F;
        ASSERT_NEAR(data.faded[c], expected, 1e-5F * (1 + expected));
        most = std::max(most, data.base[c] + data.faded[c] * 7.3F);
      }
      ASSERT_NEAR(data.best[block], most, 1e-3F);
    }
    Data counted = before;
    for (std::size_t r = 0; r < num_rows; ++r) counted.rows[r] = counted.bytes[r].data();
    count_overlap(counted.columns());
    EXPECT_EQ(counted.overlap, data.overlap);
    EXPECT_EQ(counted.faded, before.faded);
  }
}

#if defined(__x86_64__)
TEST(ColumnOverlap, EveryTierGivesTheSameBits) {
  if (!cpu_supports(CpuIsa::kAvx2)) GTEST_SKIP() << "no AVX2 here";
  for (const std::size_t num_rows : {1, 6, 40}) {
    Data one(num_rows, 20 * kBlock);
    Data other(num_rows, 20 * kBlock);
    for (int turn = 0; turn < 5; ++turn) {
      compare_columns_scalar(one.columns(), one.similarity());
      compare_columns_avx2(other.columns(), other.similarity());
      count_overlap_scalar(one.columns());
      count_overlap_avx2(other.columns());
    }
    EXPECT_EQ(one.overlap, other.overlap);
    EXPECT_EQ(one.faded, other.faded);
    EXPECT_EQ(one.best, other.best);
  }
}
#endif

}  // namespace
}  // namespace sluice
