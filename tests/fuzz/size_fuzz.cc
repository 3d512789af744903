// Any bytes are either a size within its bounds or a ConfigError.

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <string_view>

#include "base/error.h"
#include "base/size.h"

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  try {
    const sluice::Size parsed =
        sluice::parse_size(std::string_view(reinterpret_cast<const char*>(data), size));
    const bool is_share = parsed.kind == sluice::Size::Kind::kShare;
    if (is_share && !(parsed.share > 0 && parsed.share <= 1)) std::abort();
    if (!is_share && parsed.bytes >> 63 != 0) std::abort();
  } catch (const sluice::ConfigError&) {
  }
  return 0;
}
