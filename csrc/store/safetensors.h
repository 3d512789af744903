#pragma once

#include <cstdint>
#include <map>
#include <span>
#include <string>
#include <string_view>
#include <vector>

namespace sluice {

class ReadFile;

/// One tensor of a safetensors file. `offset` counts from the start of the file.
struct TensorInfo {
  std::string name;
  std::string dtype;  ///< as written: "BF16", "U8", …
  std::vector<std::int64_t> shape;
  std::uint64_t offset = 0;
  std::uint64_t bytes = 0;
};

struct SafetensorsHeader {
  std::vector<TensorInfo> tensors;  ///< by offset
  std::map<std::string, std::string> metadata;
  std::uint64_t header_bytes = 0;  ///< the 8-byte length included
  std::string file;                ///< `ReadFile::identity` of the file it was read from
};

/// Longest header a file may announce.
inline constexpr std::uint64_t kMaxHeaderBytes = 100'000'000;

/// Parses `header`, the JSON behind the 8-byte length, of a file of `file_bytes`. Strict: the file
/// is hostile until proven. Pure, hence fuzzed.
/// Errors: CheckpointError, a case of its own for each lie: not an object, duplicate name, unknown
/// dtype, negative or overflowing shape, shape · dtype ≠ length, offsets out of order, a gap or an
/// overlap between tensors, an end other than the end of the file, trailing bytes.
[[nodiscard]] SafetensorsHeader parse_safetensors_header(std::string_view header,
                                                         std::uint64_t file_bytes);

/// The JSON of a file's header, read but not parsed. Errors: IoError, CheckpointError.
[[nodiscard]] std::string read_safetensors_header_text(const ReadFile& file);

/// Reads and parses the header of a file. Errors: IoError, CheckpointError (path in front).
[[nodiscard]] SafetensorsHeader read_safetensors_header(const std::string& path);

}  // namespace sluice
