#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <string>
#include <string_view>

#include "base/error.h"
#include "base/json.h"

// What is accepted, written and parsed again is the same value and the same text.
extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  try {
    const sluice::Json value = sluice::Json::parse({reinterpret_cast<const char*>(data), size});
    const std::string text = value.dump();
    const sluice::Json again = sluice::Json::parse(text);
    if (!(again == value) || again.dump() != text) std::abort();
  } catch (const sluice::CheckpointError&) {
  }
  return 0;
}
