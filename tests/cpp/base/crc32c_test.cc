#include "base/crc32c.h"

#include <gtest/gtest.h>

#include <random>
#include <string_view>
#include <vector>

namespace sluice {
namespace {

std::span<const std::byte> bytes_of(std::string_view text) {
  return std::as_bytes(std::span(text));
}

std::vector<std::byte> random_bytes(std::size_t bytes, std::uint32_t seed) {
  std::mt19937 random(seed);
  std::vector<std::byte> out(bytes);
  for (std::byte& byte : out) byte = static_cast<std::byte>(random());
  return out;
}

TEST(Crc32c, GivesThePublishedValues) {
  EXPECT_EQ(crc32c(bytes_of("123456789")), 0xe3069283u);
  EXPECT_EQ(detail::crc32c_tables(bytes_of("123456789"), 0), 0xe3069283u);
  EXPECT_EQ(crc32c({}), 0u);
  EXPECT_EQ(crc32c(std::vector<std::byte>(32)), 0x8a9136aau);                   // RFC 3720, B.4
  EXPECT_EQ(crc32c(std::vector<std::byte>(32, std::byte{0xff})), 0x62a8ab43u);  // the same
}

TEST(Crc32c, GivesTheSameByInstructionAndByTable) {
  if (!detail::has_sse42()) GTEST_SKIP() << "this CPU has no SSE4.2";
  for (const std::size_t bytes : {0, 1, 7, 8, 9, 63, 4095, 4096, 12287, 12288, 12289, 40000}) {
    const auto data = random_bytes(bytes + 3, 7);
    for (const std::size_t shift : {0, 1, 3}) {
      const auto part = std::span(data).subspan(shift, bytes);
      EXPECT_EQ(detail::crc32c_sse42(part, 0x1234u), detail::crc32c_tables(part, 0x1234u)) << bytes;
    }
  }
}

TEST(Crc32c, ContinuesAndCombinesPartsLikeOneBuffer) {
  const auto data = random_bytes(30000, 11);
  const std::uint32_t whole = crc32c(data);
  for (const std::size_t cut : {0, 1, 17, 4096, 12288, 29999, 30000}) {
    const auto a = std::span(data).first(cut);
    const auto b = std::span(data).subspan(cut);
    EXPECT_EQ(crc32c(b, crc32c(a)), whole);
    EXPECT_EQ(crc32c_combine(crc32c(a), crc32c(b), b.size()), whole);
  }
}

TEST(Crc32c, SeesEveryFlippedBit) {
  auto data = random_bytes(64, 3);
  const std::uint32_t before = crc32c(data);
  for (std::byte& byte : data) {
    for (int bit = 0; bit < 8; ++bit) {
      byte ^= std::byte{1} << bit;
      EXPECT_NE(crc32c(data), before);
      byte ^= std::byte{1} << bit;
    }
  }
}

}  // namespace
}  // namespace sluice
