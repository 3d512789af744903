#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "store/expert_store.h"

namespace sluice {

/// What a pack says of itself and of where it comes from (the JSON in its `sluice` metadata).
struct PackManifest {
  std::string model_id;
  std::string revision;
  std::string config_sha256;
  /// `fingerprint_files` of the source shards, or of whatever stands for them (adopted models).
  std::string source_fingerprint;
  std::vector<StoredLayer> layers;

  [[nodiscard]] std::string to_json() const;  ///< sorted keys, no dates: same input, same bytes
  /// Errors: CheckpointError. Pure, hence fuzzed.
  [[nodiscard]] static PackManifest from_json(std::string_view json);
};

/// Writes `<path>`: a legal safetensors file in which every expert is one U8 tensor
/// `layers.<l>.experts.<e>` that starts and ends on multiples of 4096, then `sluice.crc32c`. Bytes
/// go to `<path>.partial` under an exclusive flock, CRCs to `<path>.journal` after their data is
/// synced; `finish` syncs and renames. Experts come in order, layer by layer.
///
/// Errors: IoError when another process writes the same pack (names its pid), when the disk is too
/// small (before the first byte) or fails; ConfigError when a journal of another source or manifest
/// lies there (delete it, or pass `fresh`).
class PackWriter {
 public:
  /// What is written is synced and journalled every 256 MiB: what a crash can cost.
  static constexpr std::uint64_t kSyncBytes = 256 * kMiB;

  PackWriter(std::string path, PackManifest manifest, bool fresh = false,
             std::uint64_t sync_bytes = kSyncBytes);
  ~PackWriter();  ///< without `finish`: leaves `.partial` and `.journal` for a resume
  PackWriter(const PackWriter&) = delete;
  PackWriter& operator=(const PackWriter&) = delete;

  /// Experts that an earlier run has written: `append` starts with the one behind them.
  [[nodiscard]] std::int64_t resumed_experts() const;
  [[nodiscard]] std::int64_t num_experts() const;
  [[nodiscard]] std::uint64_t file_bytes() const;
  /// The next expert's canonical bytes (`layout.bytes()` of them).
  void append(std::span<const std::byte> expert);
  /// Errors: InternalError when experts are missing.
  void finish();

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

/// Opens a finished pack and proves it: header, manifest, sizes, checksums' tensor. Opened once, so
/// that the store reads what was proven, whatever takes its name later.
/// Errors: CheckpointError naming the path and the lie; a `.partial` is refused by name.
[[nodiscard]] std::shared_ptr<const ExpertStore> open_pack(const std::string& path,
                                                           ExpertStore::Options options,
                                                           PackManifest* manifest = nullptr);

/// Reads everything and compares every checksum. `progress` is called with bytes done and all.
/// Errors: CheckpointError naming the first expert that differs.
void verify_pack(const std::string& path,
                 const std::function<void(std::uint64_t, std::uint64_t)>& progress);

}  // namespace sluice
