#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <string_view>

namespace sluice {

/// SHA-256 of bytes that come in parts. Source: FIPS 180-4.
class Sha256 {
 public:
  void update(std::span<const std::byte> bytes);
  void update(std::string_view text);
  /// The digest of everything so far; call once.
  [[nodiscard]] std::array<std::uint8_t, 32> digest();
  /// The same in lower-case hex.
  [[nodiscard]] std::string hex_digest();

 private:
  void compress(const std::uint8_t* block);

  std::array<std::uint32_t, 8> state_ = {0x6a09e667, 0xbb67ae85, 0x3c6ef372, 0xa54ff53a,
                                         0x510e527f, 0x9b05688c, 0x1f83d9ab, 0x5be0cd19};
  std::array<std::uint8_t, 64> block_{};
  std::size_t block_bytes_ = 0;
  std::uint64_t total_bytes_ = 0;
};

/// SHA-256 of `text` in lower-case hex.
[[nodiscard]] std::string sha256_hex(std::string_view text);

}  // namespace sluice
