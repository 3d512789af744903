// mma, ldmatrix and cp.async against their definitions.

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <bit>
#include <cmath>
#include <random>
#include <vector>

#include "tests/emulation/harness.h"
#include "tests/emulation/simt_test_kernels.h"

namespace simt::testing {
namespace {

template <class T>
std::uint32_t bits_of(float value) {
  if constexpr (std::is_same_v<T, __half>) {
    return std::bit_cast<std::uint16_t>(__float2half(value));
  } else {
    return std::bit_cast<std::uint16_t>(__float2bfloat16(value));
  }
}
template <class T>
float rounded(float value) {
  if constexpr (std::is_same_v<T, __half>) {
    return __half2float(__float2half(value));
  } else {
    return __bfloat162float(__float2bfloat16(value));
  }
}

struct Product {
  float a[16][16], b[16][8], c[16][8], d[16][8];
};

// Element i of a lane's fragment, as the PTX manual words it: "row = groupID for ai where 0 <= i <
// 2
// || 4 <= i < 6, groupID + 8 otherwise; col = threadID_in_group * 2 + (i & 1) for ai where i < 4,
// + 8 otherwise", and likewise for b and c.
template <class T>
void multiply(Product& p) {
  Array<std::uint32_t> a(128), b(64);
  Array<float> c(128), d(128);
  a.fill(0);
  b.fill(0);
  for (int lane = 0; lane < 32; ++lane) {
    const int group = lane >> 2, thread = lane % 4;
    for (int i = 0; i < 8; ++i) {
      const int row = i < 2 || (i >= 4 && i < 6) ? group : group + 8;
      const int column = thread * 2 + (i & 1) + (i < 4 ? 0 : 8);
      a[lane * 4 + i / 2] |= bits_of<T>(p.a[row][column]) << 16 * (i % 2);
    }
    for (int i = 0; i < 4; ++i) {
      const int row = thread * 2 + (i & 1) + (i < 2 ? 0 : 8);
      b[lane * 2 + i / 2] |= bits_of<T>(p.b[row][group]) << 16 * (i % 2);
    }
  }
  c.generate([&](std::size_t i) {
    const std::size_t lane = i / 4, element = i % 4;
    return p.c[lane / 4 + (element < 2 ? 0 : 8)][lane % 4 * 2 + (element & 1)];
  });
  ASSERT_EQ(run("mma", {}, mma_kernel,
                MmaArgs{a.data(), b.data(), c.data(), d.data(), std::is_same_v<T, __half>}),
            "");
  for (std::size_t i = 0; i < 128; ++i) {
    const std::size_t lane = i / 4, element = i % 4;
    p.d[lane / 4 + (element < 2 ? 0 : 8)][lane % 4 * 2 + (element & 1)] = d[i];
  }
}

template <class T>
Product random_product(float (*draw)(std::mt19937&)) {
  std::mt19937 random(7);
  Product p = {};
  for (auto& row : p.a) {
    for (float& value : row) value = rounded<T>(draw(random));
  }
  for (auto& row : p.b) {
    for (float& value : row) value = rounded<T>(draw(random));
  }
  for (auto& row : p.c) {
    for (float& value : row) value = draw(random);
  }
  return p;
}

float small_integer(std::mt19937& random) { return static_cast<float>(random() % 15) - 7.0f; }
float real(std::mt19937& random) { return std::normal_distribution<float>()(random); }

constexpr MmaModel kModels[] = {MmaModel::kFp32InOrder, MmaModel::kFp64PerEight,
                                MmaModel::kFp64PerEightTruncated};

template <class T>
class Mma : public ::testing::Test {};
using Operands = ::testing::Types<__nv_bfloat16, __half>;
TYPED_TEST_SUITE(Mma, Operands);

TYPED_TEST(Mma, IsExactOnSmallIntegersInEveryModel) {
  for (const MmaModel model : kModels) {
    const With with({.mma = model});
    Product p = random_product<TypeParam>(small_integer);
    multiply<TypeParam>(p);
    for (int row = 0; row < 16; ++row) {
      for (int column = 0; column < 8; ++column) {
        float sum = p.c[row][column];
        for (int k = 0; k < 16; ++k) sum += p.a[row][k] * p.b[k][column];
        EXPECT_EQ(p.d[row][column], sum) << row << "," << column;
      }
    }
  }
}

TYPED_TEST(Mma, StaysWithinItsRoundingOnReals) {
  std::vector<Product> by_model;
  for (const MmaModel model : kModels) {
    const With with({.mma = model});
    Product& p = by_model.emplace_back(random_product<TypeParam>(real));
    multiply<TypeParam>(p);
    for (int row = 0; row < 16; ++row) {
      for (int column = 0; column < 8; ++column) {
        double sum = p.c[row][column], terms = std::fabs(sum);
        for (int k = 0; k < 16; ++k) {
          const double term = static_cast<double>(p.a[row][k]) * p.b[k][column];
          sum += term;
          terms += std::fabs(term);
        }
        // 32 roundings at most, each of half a unit, or a whole one where it truncates.
        EXPECT_NEAR(p.d[row][column], sum, 32 * 0x1p-23 * terms);
      }
    }
  }
  int different = 0;
  for (int i = 0; i < 128; ++i) {
    different += by_model[0].d[i / 8][i % 8] != by_model[1].d[i / 8][i % 8] ? 1 : 0;
    different += by_model[1].d[i / 8][i % 8] != by_model[2].d[i / 8][i % 8] ? 1 : 0;
  }
  EXPECT_GT(different, 20) << "the models are there because they differ";
}

TEST(MmaFp16, WidensSubnormalsAndInfinities) {
  Product p = {};
  p.a[0][0] = 0x1p-24f;  // the smallest subnormal
  p.b[0][0] = 1.0f;
  p.a[1][0] = -0x1.8p-15f;  // a negative one
  p.a[2][0] = 65504.0f;     // the largest number
  p.a[3][0] = INFINITY;
  multiply<__half>(p);
  EXPECT_EQ(p.d[0][0], 0x1p-24f);
  EXPECT_EQ(p.d[1][0], -0x1.8p-15f);
  EXPECT_EQ(p.d[2][0], 65504.0f);
  EXPECT_EQ(p.d[3][0], INFINITY);
}

TEST(Ldmatrix, GivesEachLaneItsPairs) {
  Array<std::uint16_t> in(32 * 8);
  Array<std::uint32_t> out(32 * 4);
  in.generate([](std::size_t i) { return i; });  // row r of matrix m starts at (8 m + r) * 8
  for (const bool transpose : {false, true}) {
    ASSERT_EQ(run("ldmatrix", {}, ldmatrix_kernel, in.data(), out.data(), transpose), "");
    for (unsigned lane = 0; lane < 32; ++lane) {
      for (unsigned m = 0; m < 4; ++m) {
        const auto element = [&](unsigned row, unsigned column) {
          return (8 * m + row) * 8 + column;
        };
        const unsigned g = lane / 4, t = lane % 4;
        const unsigned low = transpose ? element(2 * t, g) : element(g, 2 * t);
        const unsigned high = transpose ? element(2 * t + 1, g) : element(g, 2 * t + 1);
        EXPECT_EQ(out[lane * 4 + m], low | high << 16) << "lane " << lane << " matrix " << m;
      }
    }
  }
}

TEST(CpAsync, FillsWithZerosBehindTheSource) {
  for (const bool late : {true, false}) {
    const With with({.late_cp_async = late});
    for (const int from_bytes : {0, 4, 12, 16}) {
      Array<int> in(64 * 4), out(64 * 4);
      in.generate([](std::size_t i) { return i + 1; });
      ASSERT_EQ(run("cp_async", {.block = 64, .shared_bytes = 64 * 16}, cp_async_kernel, in.data(),
                    out.data(), from_bytes),
                "");
      for (int i = 0; i < 256; ++i) {
        const int expected = i % 4 * 4 < from_bytes ? (i + 4) % 256 + 1 : 0;
        EXPECT_EQ(out[i], expected) << "element " << i << " of " << from_bytes << " bytes";
      }
    }
  }
}

TEST(CpAsync, ReadsNothingOfAnEmptySource) {
  Array<int> in(4), out(256);
  in.fill(1);
  // 63 of the 64 addresses lie behind the array, where a load would fault.
  ASSERT_EQ(run("cp_async", {.block = 64, .shared_bytes = 64 * 16}, cp_async_kernel, in.data(),
                out.data(), 0),
            "");
  EXPECT_EQ(out[7], 0);
}

TEST(CpAsync, LandsGroupsInOrder) {
  for (const Order order : kOrders) {
    for (const bool late : {true, false}) {
      const With with({.order = order, .late_cp_async = late});
      constexpr int kStages = 5;
      Array<int> in(kStages * 128), out(32);
      in.generate([](std::size_t i) { return i * i; });
      ASSERT_EQ(run("two_stages", {}, two_stages_kernel, in.data(), out.data(), kStages), "");
      for (int lane = 0; lane < 32; ++lane) {
        int sum = 0;
        for (int stage = 0; stage < kStages; ++stage) {
          for (int i = 0; i < 4; ++i) sum += in[(stage * 32 + (lane + stage) % 32) * 4 + i];
        }
        EXPECT_EQ(out[lane], sum);
      }
    }
  }
}

}  // namespace
}  // namespace simt::testing
