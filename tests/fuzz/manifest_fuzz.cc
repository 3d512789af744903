#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <string_view>

#include "base/error.h"
#include "store/pack/pack.h"
#include "store/pack/pack_format.h"

// A manifest that is accepted says the same when it is written again, and its sizes add up.
extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  try {
    const auto manifest =
        sluice::PackManifest::from_json({reinterpret_cast<const char*>(data), size});
    const std::string again = manifest.to_json();
    if (sluice::PackManifest::from_json(again).to_json() != again) std::abort();
    const std::uint64_t total = sluice::total_blob_bytes(manifest.layers);
    if (total % 4096 != 0 || total == 0) std::abort();
  } catch (const sluice::CheckpointError&) {
  }
  return 0;
}
