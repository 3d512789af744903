#pragma once

#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include "base/expert_layout.h"
#include "store/pack/pack.h"

namespace sluice {

/// The metadata value that names the format.
inline constexpr const char* kPackFormat = "sluice.pack/1";
/// The last tensor: one CRC-32C per expert and extent.
inline constexpr const char* kPackChecksums = "sluice.crc32c";

/// One expert in a pack: its layout, padded with zeros to 4096.
[[nodiscard]] std::size_t blob_bytes(const ExpertLayout& layout);

/// All blobs together. Errors: CheckpointError when there are too many to count.
[[nodiscard]] std::uint64_t total_blob_bytes(std::span<const StoredLayer> layers);
[[nodiscard]] std::int64_t total_experts(std::span<const StoredLayer> layers);

/// "layers.<l>.experts.<e>".
[[nodiscard]] std::string blob_name(std::size_t layer, std::int32_t expert);

/// A pack's first bytes: length, JSON, spaces up to a multiple of 4096. Everything else follows
/// from it and the manifest: blobs layer by layer, then the checksums' tensor.
[[nodiscard]] std::string pack_header(const PackManifest& manifest);

/// Zeroes what no section of `layout` covers in a blob: between sections and behind the last.
void clear_gaps(const ExpertLayout& layout, std::span<std::byte> blob);

}  // namespace sluice
