#include "store/fingerprint.h"

#include <algorithm>
#include <array>
#include <vector>

#include "base/bytes.h"
#include "base/crc32c.h"
#include "base/sha256.h"
#include "store/file.h"
#include "store/safetensors.h"

namespace sluice {
namespace {

constexpr std::uint64_t kBlocks = 64;
constexpr std::uint64_t kBlockBytes = 4096;

// One CRC over 64 blocks that are spread evenly over the tensors' bytes (all, where they are few).
std::uint32_t sample(const ReadFile& file, std::uint64_t begin) {
  const std::uint64_t data_bytes = file.bytes() - begin;
  std::array<std::byte, kBlockBytes> block;
  std::uint32_t crc = 0;
  if (data_bytes <= kBlocks * kBlockBytes) {
    for (std::uint64_t at = 0; at < data_bytes; at += kBlockBytes) {
      const auto bytes = std::min(kBlockBytes, data_bytes - at);
      file.read_exact(begin + at, bytes, block.data());
      crc = crc32c(std::span(block).first(bytes), crc);
    }
    return crc;
  }
  const std::uint64_t span = data_bytes - kBlockBytes;
  for (std::uint64_t i = 0; i < kBlocks; ++i) {
    // span * i / 63 without overflow
    const std::uint64_t at = span / (kBlocks - 1) * i + span % (kBlocks - 1) * i / (kBlocks - 1);
    file.read_exact(begin + at, kBlockBytes, block.data());
    crc = crc32c(block, crc);
  }
  return crc;
}

}  // namespace

std::string fingerprint_files(std::span<const std::string> paths) {
  std::vector<std::string> records;
  for (const std::string& path : paths) {
    const ReadFile file(path, false);
    const std::string header = read_safetensors_header_text(file);
    records.push_back(std::to_string(file.bytes()) + " " + sha256_hex(header) + " " +
                      std::to_string(sample(file, 8 + header.size())) + "\n");
  }
  std::sort(records.begin(), records.end());
  Sha256 hash;
  hash.update("sluice.fingerprint/1\n");
  for (const std::string& record : records) hash.update(record);
  return hash.hex_digest();
}

}  // namespace sluice
