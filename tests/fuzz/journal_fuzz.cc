#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <string>
#include <string_view>

#include "store/pack/journal.h"

// What is read from a journal, written and read again is the same.
extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  const auto journal = sluice::Journal::parse({reinterpret_cast<const char*>(data), size});
  if (journal.header_sha256.empty()) {
    if (!journal.checksums.empty()) std::abort();
    return 0;
  }
  std::string text = journal.first_line();
  for (std::size_t i = 0; i < journal.checksums.size(); ++i) {
    text += sluice::Journal::line(i, journal.checksums[i]);
  }
  const auto again = sluice::Journal::parse(text);
  if (again.header_sha256 != journal.header_sha256 || again.pid != journal.pid ||
      again.checksums != journal.checksums) {
    std::abort();
  }
  return 0;
}
