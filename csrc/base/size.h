#pragma once

#include <cstdint>
#include <string_view>

namespace sluice {

/// An amount of memory as a user writes it: bytes, or a share of something known later.
struct Size {
  enum class Kind : std::uint8_t { kBytes, kShare };
  Kind kind = Kind::kBytes;
  std::uint64_t bytes = 0;  ///< kBytes, below 2^63
  double share = 0;         ///< kShare, above 0 up to 1, which is all of it
};

/// Reads "6GiB" (2^30), "6GB" (10^9), "1.5 MiB", "4096", "25%"; units in any case, K to T. Decimals
/// are exact: fractions of a byte are cut off. Pure, hence fuzzed.
/// Errors: ConfigError on anything else, signs, exponents, amounts of 2^63 bytes or more, a share
/// of nothing or of more than all.
[[nodiscard]] Size parse_size(std::string_view text);

}  // namespace sluice
