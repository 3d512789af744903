#include "base/dtype.h"

#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <limits>

namespace sluice {
namespace {

std::uint32_t bits_of(float value) { return std::bit_cast<std::uint32_t>(value); }

/// What a half's bits mean, from the format's definition in exact arithmetic.
double meaning(std::uint16_t bits, int exponent_bits, int mantissa_bits) {
  const int mantissa = bits & ((1 << mantissa_bits) - 1);
  const int exponent = (bits >> mantissa_bits) & ((1 << exponent_bits) - 1);
  const double sign = (bits & 0x8000) != 0 ? -1 : 1;
  const int bias = (1 << (exponent_bits - 1)) - 1;
  if (exponent == (1 << exponent_bits) - 1) {
    return mantissa == 0 ? sign * std::numeric_limits<double>::infinity() : std::nan("");
  }
  const int leading = exponent == 0 ? 0 : 1 << mantissa_bits;
  return sign * std::ldexp(leading + mantissa, std::max(exponent, 1) - bias - mantissa_bits);
}

template <class T>
void widens_to_its_meaning(int exponent_bits, int mantissa_bits) {
  for (std::uint32_t bits = 0; bits < 0x10000; ++bits) {
    const T half{static_cast<std::uint16_t>(bits)};
    const double truth = meaning(half.bits, exponent_bits, mantissa_bits);
    const float value = to_float(half);
    if (std::isnan(truth)) {
      ASSERT_TRUE(std::isnan(value)) << bits;
    } else {
      ASSERT_EQ(static_cast<double>(value), truth) << bits;
      ASSERT_EQ(std::signbit(value), std::signbit(truth)) << bits;
      ASSERT_EQ(from_float<T>(value).bits, half.bits);
    }
  }
}

TEST(DType, EveryHalfWidensToItsMeaningAndBack) {
  widens_to_its_meaning<Float16>(5, 10);
  widens_to_its_meaning<BFloat16>(8, 7);
}

/// Between two neighbouring halves: below the middle down, above it up, the middle to the even one.
template <class T>
void rounds_to_nearest_even(std::uint16_t largest) {
  for (std::uint32_t low = 0; low < largest; ++low) {
    const T a{static_cast<std::uint16_t>(low)};
    const T b{static_cast<std::uint16_t>(low + 1)};
    const double middle = (double{to_float(a)} + to_float(b)) / 2;
    const auto even = static_cast<std::uint16_t>((low & 1) == 0 ? low : low + 1);
    const float tie = static_cast<float>(middle);
    ASSERT_EQ(double{tie}, middle);
    ASSERT_EQ(from_float<T>(tie).bits, even) << low;
    ASSERT_EQ(from_float<T>(-tie).bits, even | 0x8000) << low;
    ASSERT_EQ(from_float<T>(std::nextafter(tie, 0.0f)).bits, a.bits) << low;
    ASSERT_EQ(from_float<T>(std::nextafter(tie, INFINITY)).bits, b.bits) << low;
  }
}

TEST(DType, NarrowingRoundsToNearestEvenBetweenAllNeighbours) {
  rounds_to_nearest_even<Float16>(0x7bff);
  rounds_to_nearest_even<BFloat16>(0x7f7f);
}

TEST(DType, NarrowingPastTheLargestGivesInfinity) {
  EXPECT_EQ(from_float<Float16>(65519.996f).bits, 0x7bff);
  EXPECT_EQ(from_float<Float16>(65520.0f).bits, 0x7c00);
  EXPECT_EQ(from_float<Float16>(-1e30f).bits, 0xfc00);
  EXPECT_EQ(from_float<BFloat16>(std::numeric_limits<float>::max()).bits, 0x7f80);
}

TEST(DType, NaNsStayNaNs) {
  for (const std::uint32_t payload : {0x7f800001u, 0x7fc00000u, 0xffffffffu, 0xff800100u}) {
    const float nan = std::bit_cast<float>(payload);
    EXPECT_TRUE(std::isnan(to_float(from_float<Float16>(nan)))) << payload;
    EXPECT_TRUE(std::isnan(to_float(from_float<BFloat16>(nan)))) << payload;
  }
}

TEST(DType, NamesAreReadBack) {
  for (const DType dtype : {DType::kF32, DType::kBF16, DType::kF16}) {
    EXPECT_EQ(parse_dtype(dtype_name(dtype)), dtype);
  }
  EXPECT_THROW((void)parse_dtype("F64"), CheckpointError);
  EXPECT_THROW((void)parse_dtype("bf16"), CheckpointError);
}

TEST(DType, DispatchCallsWithTheStorageType) {
  const auto size = [](auto tag) { return sizeof(typename decltype(tag)::type); };
  for (const DType dtype : {DType::kF32, DType::kBF16, DType::kF16}) {
    EXPECT_EQ(dispatch_dtype(dtype, size), element_bytes(dtype));
  }
  EXPECT_EQ(bits_of(from_float<float>(-0.0f)), 0x80000000u);
}

}  // namespace
}  // namespace sluice
