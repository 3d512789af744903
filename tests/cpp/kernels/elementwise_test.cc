// Conversions, combine, the reference GEMM and the choice of a tier.
#include <gtest/gtest.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "base/error.h"
#include "kernels/bandwidth.h"
#include "kernels/combine.h"
#include "kernels/convert.h"
#include "kernels/cpu_isa.h"
#include "kernels/gemm.h"
#include "kernels/test_data.h"
#include "kernels/tiers.h"

#if defined(__x86_64__)
#include <xmmintrin.h>
#endif

namespace sluice {
namespace {

using testing::tiers;

constexpr DType kHalves[] = {DType::kBF16, DType::kF16};

float scalar_widen(DType dtype, std::uint16_t bits) {
  return dtype == DType::kBF16 ? to_float(BFloat16{bits}) : to_float(Float16{bits});
}
std::uint16_t scalar_narrow(DType dtype, float value) {
  return dtype == DType::kBF16 ? from_float<BFloat16>(value).bits : from_float<Float16>(value).bits;
}

TEST(Convert, WideningEveryHalfGivesTheScalarBits) {
  std::vector<std::uint16_t> halves(0x10000);
  for (std::size_t i = 0; i < halves.size(); ++i) halves[i] = static_cast<std::uint16_t>(i);
  for (const DType dtype : kHalves) {
    for (const CpuIsa isa : tiers()) {
      std::vector<float> wide(halves.size());
      widen(elementwise_kernels(isa), dtype, halves.data(), wide.data(), 0x10000);
      for (std::size_t i = 0; i < halves.size(); ++i) {
        ASSERT_EQ(std::bit_cast<std::uint32_t>(wide[i]),
                  std::bit_cast<std::uint32_t>(scalar_widen(dtype, halves[i])))
            << i << ' ' << cpu_isa_name(isa);
      }
    }
  }
}

/// All values next to the borders at which a half's rounding changes, and random bits.
std::vector<float> rounding_borders() {
  std::vector<float> values;
  for (const DType dtype : kHalves) {
    for (std::uint32_t bits = 0; bits < 0x10000; ++bits) {
      const float value = scalar_widen(dtype, static_cast<std::uint16_t>(bits));
      const float above = scalar_widen(dtype, static_cast<std::uint16_t>(bits + 1));
      const float middle = value / 2 + above / 2;
      for (const float v :
           {value, middle, std::nextafter(middle, value), std::nextafter(middle, above)}) {
        values.push_back(v);
      }
    }
  }
  std::mt19937 random(1);
  for (int i = 0; i < 200'000; ++i) {
    values.push_back(std::bit_cast<float>(static_cast<std::uint32_t>(random())));
  }
  return values;
}

TEST(Convert, NarrowingAroundEveryRoundingBorderGivesTheScalarBits) {
  const std::vector<float> values = rounding_borders();
  for (const DType dtype : kHalves) {
    for (const CpuIsa isa : tiers()) {
      std::vector<std::uint16_t> narrowed(values.size());
      narrow(elementwise_kernels(isa), dtype, values.data(), narrowed.data(),
             static_cast<std::int64_t>(values.size()));
      for (std::size_t i = 0; i < values.size(); ++i) {
        ASSERT_EQ(narrowed[i], scalar_narrow(dtype, values[i]))
            << std::hexfloat << values[i] << ' ' << dtype_name(dtype) << ' ' << cpu_isa_name(isa);
      }
    }
  }
}

TEST(Convert, EveryLengthIsConvertedAndNothingBehindIt) {
  for (const DType dtype : {DType::kF32, DType::kBF16, DType::kF16}) {
    for (const CpuIsa isa : tiers()) {
      const ElementwiseKernels& kernels = elementwise_kernels(isa);
      for (std::int64_t count = 0; count < 50; ++count) {
        std::vector<float> in(static_cast<std::size_t>(count), 1.5f);
        std::vector<std::byte> half(in.size() * element_bytes(dtype) + 2, std::byte{0x77});
        std::vector<float> out(in.size() + 1, -1.0f);
        narrow(kernels, dtype, in.data(), half.data(), count);
        EXPECT_EQ(half.back(), std::byte{0x77});
        widen(kernels, dtype, half.data(), out.data(), count);
        EXPECT_EQ(out.back(), -1.0f);
        out.pop_back();
        ASSERT_EQ(out, in);
      }
    }
  }
}

#if defined(__x86_64__)
TEST(Convert, ACallerThatFlushesSubnormalsGetsTheSameBits) {
  const std::vector<float> tiny(40, 1e-40f);
  std::vector<std::uint16_t> expected(40);
  std::vector<std::uint16_t> got(40);
  narrow(DType::kBF16, tiny.data(), expected.data(), 40);
  const unsigned saved = _mm_getcsr();
  _mm_setcsr(saved | 0x8040);  // flush to zero, denormals are zero
  narrow(DType::kBF16, tiny.data(), got.data(), 40);
  const unsigned during = _mm_getcsr();
  _mm_setcsr(saved);
  EXPECT_EQ(got, expected);
  EXPECT_NE(expected[0], 0);
  EXPECT_EQ(during & 0x8040, 0x8040u);  // the caller's setting is given back

  const float weight = 1.0f;
  const std::uint8_t valid = 1;
  float sum = 0;
  SerialFor serial;
  _mm_setcsr(saved | 0x8040);
  combine(tiny.data(), &weight, &valid, 1, 1, 1, DType::kF32, &sum, serial);
  _mm_setcsr(saved);
  EXPECT_EQ(std::bit_cast<std::uint32_t>(sum), std::bit_cast<std::uint32_t>(1e-40f));
}
#endif

/// The contract of combine, word for word.
std::vector<float> combine_by_definition(const std::vector<float>& rows,
                                         const std::vector<float>& weights,
                                         const std::vector<std::uint8_t>& valid, std::size_t tokens,
                                         std::size_t top_k, std::size_t hidden) {
  std::vector<float> out(tokens * hidden);
  for (std::size_t t = 0; t < tokens; ++t) {
    for (std::size_t h = 0; h < hidden; ++h) {
      float sum = 0;
      for (std::size_t k = 0; k < top_k; ++k) {
        const std::size_t at = t * top_k + k;
        if (valid[at] != 0) sum = std::fma(weights[at], rows[at * hidden + h], sum);
      }
      out[t * hidden + h] = sum;
    }
  }
  return out;
}

TEST(Combine, SumsInKOrderWithoutTheInvalidRows) {
  std::mt19937 random(1);
  std::normal_distribution<float> normal;
  const auto pool = make_thread_pool(3);
  SerialFor serial;
  for (const std::size_t hidden : {1u, 5u, 16u, 511u, 512u, 513u, 1300u}) {
    for (const std::size_t tokens : {0u, 1u, 3u, 40u}) {
      for (const std::size_t top_k : {1u, 2u, 8u}) {
        std::vector<float> rows(tokens * top_k * hidden);
        std::vector<float> weights(tokens * top_k);
        std::vector<std::uint8_t> valid(tokens * top_k);
        for (float& v : rows) v = normal(random);
        for (float& v : weights) v = normal(random);
        for (std::size_t i = 0; i < valid.size(); ++i) {
          valid[i] = random() % 4 != 0;
          if (valid[i] == 0) rows[i * hidden] = std::nanf("");  // must not be read into the sum
        }
        const auto expected = combine_by_definition(rows, weights, valid, tokens, top_k, hidden);
        for (ParallelFor* parallel : std::initializer_list<ParallelFor*>{&serial, pool.get()}) {
          std::vector<float> got(expected.size());
          combine(rows.data(), weights.data(), valid.data(), static_cast<std::int64_t>(tokens),
                  static_cast<std::int64_t>(top_k), static_cast<std::int64_t>(hidden), DType::kF32,
                  got.data(), *parallel);
          ASSERT_TRUE(got.empty() || std::memcmp(got.data(), expected.data(), got.size() * 4) == 0);
          for (const DType dtype : kHalves) {
            std::vector<std::uint16_t> rounded(expected.size());
            combine(rows.data(), weights.data(), valid.data(), static_cast<std::int64_t>(tokens),
                    static_cast<std::int64_t>(top_k), static_cast<std::int64_t>(hidden), dtype,
                    rounded.data(), *parallel);
            for (std::size_t i = 0; i < rounded.size(); ++i) {
              ASSERT_EQ(rounded[i], scalar_narrow(dtype, expected[i]));
            }
          }
        }
      }
    }
  }
}

TEST(Combine, TheOrderOfKIsTheOrderOfTheSum) {
  // 1 vanishes beside 2^25, not beside 0: only k order gives 1.
  const std::vector<float> rows = {0x1p25f, -0x1p25f, 1.0f};
  const std::vector<float> weights = {1, 1, 1};
  const std::vector<std::uint8_t> valid = {1, 1, 1};
  SerialFor serial;
  float sum = 0;
  combine(rows.data(), weights.data(), valid.data(), 1, 3, 1, DType::kF32, &sum, serial);
  EXPECT_EQ(sum, 1.0f);
}

TEST(Combine, ATokenWithoutExpertsIsZero) {
  const std::vector<float> rows(4, std::nanf(""));
  const std::vector<float> weights(2, 1.0f);
  const std::vector<std::uint8_t> valid(2, 0);
  SerialFor serial;
  std::vector<float> out(2, 7.0f);
  combine(rows.data(), weights.data(), valid.data(), 1, 2, 2, DType::kF32, out.data(), serial);
  EXPECT_EQ(out, std::vector<float>(2, 0.0f));
}

TEST(ReferenceGemm, MultipliesByTheTransposeIntoAStridedResult) {
  const std::vector<float> a = {1, 2, 3, 4, 5, 6};                    // [2, 3]
  const std::vector<float> b = {1, 0, 0, 0, 1, 0, 1, 1, 1, 2, 0, 1};  // [4, 3]
  std::vector<float> c(2 * 5, -1.0f);
  EXPECT_EQ(reference_gemm(nullptr, {.dtype = DType::kF32,
                                     .m = 2,
                                     .n = 4,
                                     .k = 3,
                                     .a = a.data(),
                                     .b = b.data(),
                                     .c = c.data(),
                                     .ldc = 5}),
            0);
  EXPECT_EQ(c, (std::vector<float>{1, 2, 6, 5, -1, 4, 5, 15, 14, -1}));
}

TEST(ReferenceGemm, RoundsHalvesOnce) {
  // 1 + 2^-8 is a tie in bf16: rounded after the sum, not before.
  const auto half = [](float v) { return from_float<BFloat16>(v); };
  const std::vector<BFloat16> a = {half(1), half(0x1p-8f), half(0x1p-8f)};
  const std::vector<BFloat16> b = {half(1), half(1), half(1)};
  BFloat16 c{};
  (void)reference_gemm(nullptr, {.dtype = DType::kBF16,
                                 .m = 1,
                                 .n = 1,
                                 .k = 3,
                                 .a = a.data(),
                                 .b = b.data(),
                                 .c = &c,
                                 .ldc = 1});
  EXPECT_EQ(to_float(c), 1 + 0x1p-7f);
}

TEST(CpuIsaTest, TheScalarTierIsEverywhereAndTheChoiceIsSupported) {
  EXPECT_TRUE(cpu_supports(CpuIsa::kScalar));
  EXPECT_TRUE(cpu_supports(cpu_isa()));
  EXPECT_EQ(cpu_isa_name(CpuIsa::kAvx512), "avx512");
}

TEST(CpuIsaTest, AnUnknownNameInTheEnvironmentIsRefused) {
  EXPECT_EXIT(
      {
        setenv("SLUICE_CPU_ISA", "sse9", 1);
        try {
          (void)cpu_isa();
        } catch (const ConfigError& error) {
          std::exit(std::string(error.what()).find("sse9") != std::string::npos ? 3 : 4);
        }
        std::exit(5);
      },
      ::testing::ExitedWithCode(3), "");
}

TEST(CpuIsaTest, TheEnvironmentPicksATier) {
  EXPECT_EXIT(
      {
        setenv("SLUICE_CPU_ISA", "scalar", 1);
        std::exit(cpu_isa() == CpuIsa::kScalar ? 3 : 4);
      },
      ::testing::ExitedWithCode(3), "");
}

TEST(Bandwidth, ReadsTheWholeRangeAtAFiniteRate) {
  const std::vector<std::byte> data(256 * 1024);
  SerialFor serial;
  const double rate = read_bandwidth(data.data(), data.size(), 2, serial);
  EXPECT_GT(rate, 0);
  EXPECT_TRUE(std::isfinite(rate));
}

}  // namespace
}  // namespace sluice

int main(int argc, char** argv) {
  // Exit tests run in a process of their own, where the tier is not chosen yet.
  GTEST_FLAG_SET(death_test_style, "threadsafe");
  ::testing::InitGoogleTest(&argc, argv);
  return RUN_ALL_TESTS();
}
