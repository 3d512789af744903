#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <string_view>

#include "base/error.h"
#include "store/safetensors.h"

// A header that is accepted tiles the file: no tensor leaves it, overlaps another or leaves a gap.
// The first eight bytes of the input are the size of the file that the rest claims to head.
extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  if (size < 8) return 0;
  std::uint64_t file_bytes = 0;
  for (int i = 0; i < 8; ++i) file_bytes |= std::uint64_t{data[i]} << (8 * i);
  const std::string_view text(reinterpret_cast<const char*>(data) + 8, size - 8);
  // Mostly a size that fits, else the parser's end would hardly be reached.
  if (file_bytes < 1 << 20) file_bytes += 8 + text.size();
  try {
    const sluice::SafetensorsHeader header = sluice::parse_safetensors_header(text, file_bytes);
    std::uint64_t at = header.header_bytes;
    for (const sluice::TensorInfo& tensor : header.tensors) {
      if (tensor.offset != at || tensor.bytes > file_bytes - at) std::abort();
      at += tensor.bytes;
    }
    if (at != file_bytes) std::abort();
  } catch (const sluice::CheckpointError&) {
  }
  return 0;
}
