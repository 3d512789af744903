#include "base/size.h"

#include <gtest/gtest.h>

#include <string>

#include "base/error.h"

namespace sluice {
namespace {

std::uint64_t bytes_of(std::string_view text) {
  const Size size = parse_size(text);
  EXPECT_EQ(size.kind, Size::Kind::kBytes) << text;
  return size.bytes;
}

TEST(Size, BinaryAndDecimalUnitsDiffer) {
  EXPECT_EQ(bytes_of("6GiB"), 6ull << 30);
  EXPECT_EQ(bytes_of("6GB"), 6'000'000'000ull);
  EXPECT_EQ(bytes_of("512MiB"), 512ull << 20);
  EXPECT_EQ(bytes_of("512MB"), 512'000'000ull);
  EXPECT_EQ(bytes_of("3KiB"), 3072ull);
  EXPECT_EQ(bytes_of("3kB"), 3000ull);
  EXPECT_EQ(bytes_of("2TiB"), 2ull << 40);
  EXPECT_EQ(bytes_of("2TB"), 2'000'000'000'000ull);
}

TEST(Size, PlainNumbersAreBytes) {
  EXPECT_EQ(bytes_of("123"), 123u);
  EXPECT_EQ(bytes_of("123B"), 123u);
  EXPECT_EQ(bytes_of("0"), 0u);
}

TEST(Size, DecimalsAreExact) {
  EXPECT_EQ(bytes_of("1.5GiB"), (3ull << 30) / 2);
  EXPECT_EQ(bytes_of("0.1GB"), 100'000'000ull);
  EXPECT_EQ(bytes_of("1.9"), 1u);
  EXPECT_EQ(bytes_of("4.35MB"), 4'350'000ull);  // 4.35 * 10^6 in a double is less
}

TEST(Size, SpacesAndCaseDoNotMatter) {
  EXPECT_EQ(bytes_of(" 6 gib\t"), 6ull << 30);
  EXPECT_EQ(parse_size(" 25 % ").share, 0.25);
}

TEST(Size, APercentageIsAShare) {
  EXPECT_EQ(parse_size("25%").kind, Size::Kind::kShare);
  EXPECT_EQ(parse_size("25%").share, 0.25);
  EXPECT_EQ(parse_size("100%").share, 1.0);
  EXPECT_EQ(parse_size("12.5%").share, 0.125);
}

TEST(Size, TheLargestAmountIsBelow2To63) {
  EXPECT_EQ(bytes_of("8388607TiB"), 8388607ull << 40);
  EXPECT_THROW((void)parse_size("8388608TiB"), ConfigError);
  EXPECT_THROW((void)parse_size("999999999999999999TiB"), ConfigError);
  EXPECT_THROW((void)parse_size("18446744073709551616"), ConfigError);
}

TEST(Size, AnythingElseIsRefusedAndShown) {
  for (const char* text : {"",
                           " ",
                           "GiB",
                           "%",
                           "-1",
                           "+1",
                           "-5%",
                           "0%",
                           "0.000%",
                           "100.1%",
                           "101%",
                           "1e9",
                           "nan",
                           "inf",
                           "NaN%",
                           "0x10",
                           "1.",
                           ".5GiB",
                           "1..5",
                           "1,5GiB",
                           "6GiBs",
                           "6 Gi B",
                           "6GiB 7",
                           "6%%",
                           "25%GiB",
                           "six",
                           "6XB",
                           "6P",
                           "１GiB",
                           "6GiB\n",
                           "1.0000000000000000000GiB"}) {
    try {
      (void)parse_size(text);
      ADD_FAILURE() << "accepted \"" << text << '"';
    } catch (const ConfigError& error) {
      const std::string what = error.what();
      EXPECT_NE(what.find("\"" + std::string(text) + "\""), std::string::npos) << what;
      EXPECT_NE(what.find("6GiB"), std::string::npos) << what;
    }
  }
}

TEST(Size, AByteOfZeroIsNoEnd) {
  EXPECT_THROW((void)parse_size(std::string_view("6GiB\0", 5)), ConfigError);
  EXPECT_THROW((void)parse_size(std::string_view("\0", 1)), ConfigError);
}

}  // namespace
}  // namespace sluice
