#pragma once

#include <span>
#include <string>
#include <vector>

namespace sluice {

/// What identifies a checkpoint without reading it: per shard its size, the SHA-256 of its header
/// and a CRC-32C of 64 blocks of 4 KiB at fixed fractions. Two fine-tunes of one model differ.
/// Returned as one lower-case hex string; equal inputs in any order give equal strings.
/// Errors: IoError, CheckpointError.
[[nodiscard]] std::string fingerprint_files(std::span<const std::string> paths);

}  // namespace sluice
