#include "base/sha256.h"

#include <gtest/gtest.h>

#include <string>

namespace sluice {
namespace {

TEST(Sha256, GivesThePublishedDigests) {
  EXPECT_EQ(sha256_hex(""), "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855");
  EXPECT_EQ(sha256_hex("abc"), "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad");
  EXPECT_EQ(sha256_hex("abcdbcdecdefdefgefghfghighijhijkijkljklmklmnlmnomnopnopq"),
            "248d6a61d20638b8e5c026930c3e6039a33ce45964ff2167f6ecedd419db06c1");
  EXPECT_EQ(sha256_hex(std::string(1'000'000, 'a')),
            "cdc76e5c9914fb9281a1c7e284d73e67f1809a48a497200e046d39ccc7112cd0");
}

TEST(Sha256, DoesNotDependOnHowTheBytesArrive) {
  const std::string text(300, 'x');
  for (std::size_t cut = 0; cut <= text.size(); ++cut) {
    Sha256 hash;
    hash.update(std::string_view(text).substr(0, cut));
    hash.update(std::string_view(text).substr(cut));
    ASSERT_EQ(hash.hex_digest(), sha256_hex(text)) << cut;
  }
}

TEST(Sha256, PadsEveryLengthAroundABlock) {
  std::string digests;
  for (std::size_t length = 0; length < 130; ++length) {
    digests += sha256_hex(std::string(length, 'y'));
  }
  // Python's hashlib over the same 130 texts.
  EXPECT_EQ(sha256_hex(digests),
            "bc926ed02b20a6f90f133c51f002ff11f31f3ea5e0345b08470e71184a5b393f");
}

}  // namespace
}  // namespace sluice
