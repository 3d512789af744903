#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "store/file.h"

namespace sluice {

/// What an unfinished pack has safely on disk: a first line that names the pack's header by its
/// SHA-256 and the writer by its pid, then one line per synced blob with its CRC-32C. A line that
/// was cut by a crash counts as absent.
struct Journal {
  std::string header_sha256;
  std::int64_t pid = 0;
  std::vector<std::uint32_t> checksums;

  /// Empty fields when `text` does not begin with a whole first line. Pure, hence fuzzed.
  [[nodiscard]] static Journal parse(std::string_view text);
  /// The same in words; equal journals have equal texts.
  [[nodiscard]] std::string first_line() const;
  [[nodiscard]] static std::string line(std::size_t blob, std::uint32_t crc);
};

/// The whole text of a journal; "" if there is none. Errors: IoError.
[[nodiscard]] std::string read_journal(const std::string& path);

}  // namespace sluice
