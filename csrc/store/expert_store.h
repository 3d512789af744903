#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "base/expert_layout.h"
#include "base/ids.h"
#include "store/file.h"

namespace sluice {

/// Where a source range lies: a file of the store, or memory that the store's owner keeps alive.
enum class FileIdx : std::int32_t { kMemory = -1 };

/// One contiguous source range and how its bytes become part of the canonical expert.
struct Piece {
  enum class Transform : std::uint8_t {
    kCopy,       ///< bytes as they are
    kTranspose,  ///< source [rows, columns] → target [columns, rows], of the layout's dtype
    kWiden,      ///< `dtype` → fp32 (biases)
  };
  FileIdx file = FileIdx::kMemory;
  std::uint64_t offset = 0;  ///< in the file, or the address
  std::size_t bytes = 0;     ///< of the source range
  std::size_t target_offset = 0;
  Transform transform = Transform::kCopy;
  std::int64_t rows = 0;
  std::int64_t columns = 0;
  DType dtype = DType::kF32;
};

/// Sizes above these are refused: no sum or product of them overflows (w13 stays below 2^52 bytes).
inline constexpr std::int64_t kMaxWidth = std::int64_t{1} << 24;
inline constexpr std::int32_t kMaxExperts = std::int32_t{1} << 20;

/// One MoE layer's experts: how many, and how one lies in a slot.
struct StoredLayer {
  std::string name;  ///< module path of the experts, as in the model
  std::int32_t num_experts = 0;
  ExpertLayout layout;
};

/// How a pack's checksums are used. Shards in place have none.
enum class Verify : std::uint8_t { kFirst, kAlways, kOff };

/// What reading has cost since the store was made. Exact; `bytes_read` is what the kernel was asked
/// for and gave, alignment included, so that it agrees with /proc/self/io.
struct StoreCounters {
  std::uint64_t bytes_read = 0;
  std::uint64_t reads = 0;
  std::uint64_t buffered_reads = 0;  ///< O_DIRECT was refused: the counted degradation
  std::uint64_t retried_reads = 0;   ///< short reads that were asked again
  std::uint64_t memory_bytes = 0;    ///< copied from adopted memory
};

/// Working memory of one I/O thread: an aligned bounce buffer (store/io_scratch.h).
class IoScratch;

/// Every expert's bytes at rest: ranges of pack files, of checkpoint shards, or of adopted memory.
/// Immutable once built; knows nothing of slots.
///
/// Thread safety: `read` may run on many threads at once, on different targets.
/// Errors: CheckpointError when the pieces do not cover an expert exactly once or leave a file;
/// IoError from reading, with path, offset and errno.
class ExpertStore {
 public:
  struct Options {
    std::size_t chunk_bytes = kMiB;  ///< largest read, a multiple of 4096, at most 4 MiB
    Verify verify = Verify::kFirst;
    bool direct = true;           ///< try O_DIRECT; false: buffered, not counted as degradation
    std::uint64_t read_rate = 0;  ///< bytes/s token bucket for benchmarks; 0: none
  };

  ~ExpertStore();
  ExpertStore(const ExpertStore&) = delete;
  ExpertStore& operator=(const ExpertStore&) = delete;

  [[nodiscard]] std::int32_t num_layers() const;
  [[nodiscard]] const StoredLayer& layer(LayerIdx layer) const;
  /// Bytes of one slot of this layer: the layout's, padded to 4096 where O_DIRECT reads straight
  /// into slots (packs), else to 64.
  [[nodiscard]] std::size_t slot_bytes(LayerIdx layer) const;
  /// Σ slot_bytes over all experts: what "100%" means.
  [[nodiscard]] std::uint64_t total_slot_bytes() const;

  [[nodiscard]] std::int32_t num_chunks(ExpertKey key) const;
  /// Source bytes of one chunk, before alignment.
  [[nodiscard]] std::size_t chunk_bytes(ExpertKey key, std::int32_t chunk) const;
  /// Reads one chunk into its place in `slot`. The thread that reads an expert's last chunk also
  /// checks the checksum, when it is due: CheckpointError. `bytes_read` (may be null) grows by what
  /// this call adds to `StoreCounters::bytes_read`, also when it throws.
  void read(ExpertKey key, std::int32_t chunk, std::byte* slot, IoScratch& scratch,
            std::uint64_t* bytes_read = nullptr) const;

  /// One expert's canonical bytes by the same reads, zeros between its sections; allocates.
  /// Errors: as `read`; ConfigError when `out` is not as long as the layout.
  void read_expert(ExpertKey key, std::span<std::byte> out) const;

  /// The largest read, alignment included: what an I/O thread's scratch must hold. 0: no files.
  [[nodiscard]] std::size_t largest_read_bytes() const;

  /// The expert's canonical sections where they lie in adopted memory, if all of them are there,
  /// canonical and 64-byte aligned: such an expert needs no slot when all are resident.
  struct InPlace {
    const std::byte* w13;
    const std::byte* w2;
    const std::byte* b13;
    const std::byte* b2;
  };
  [[nodiscard]] std::optional<InPlace> in_place(ExpertKey key) const;

  /// RAM that the store itself keeps experts in (adopted models). 0 for files.
  [[nodiscard]] std::uint64_t adopted_bytes() const;
  [[nodiscard]] StoreCounters counters() const;
  /// One line: "pack PATH" | "N shards in place" | "adopted memory".
  [[nodiscard]] std::string description() const;

 private:
  friend class ExpertStoreBuilder;
  struct Impl;
  explicit ExpertStore(std::unique_ptr<Impl> impl);
  std::unique_ptr<Impl> impl_;
};

/// Collects files, layers and pieces; `build` proves that every expert is covered exactly once.
class ExpertStoreBuilder {
 public:
  /// Errors: ConfigError on a chunk size that cannot work.
  explicit ExpertStoreBuilder(ExpertStore::Options options);
  ~ExpertStoreBuilder();
  ExpertStoreBuilder(const ExpertStoreBuilder&) = delete;
  ExpertStoreBuilder& operator=(const ExpertStoreBuilder&) = delete;

  /// Opens a file for reading; with an `identity`, as its header's reader saw it.
  /// Errors: IoError; CheckpointError when the path names another file by now.
  FileIdx add_file(const std::string& path, const std::string& identity = {});
  /// Takes one that is open already, for who has read its header.
  FileIdx add_file(ReadFile file);
  /// Errors: CheckpointError on sizes that are not positive or overflow.
  LayerIdx add_layer(StoredLayer layer);
  void add_piece(ExpertKey key, const Piece& piece);
  /// Slots are filled by O_DIRECT straight from aligned pieces (packs): pad them to 4096.
  void set_direct_slots(bool direct_slots);
  /// CRC-32C of the expert's padded extent, checked as Options::verify says. The expert must be one
  /// piece that covers it.
  void set_checksum(ExpertKey key, std::uint32_t crc32c);
  void set_description(std::string description);

  /// Call once. Errors: CheckpointError naming layer, expert and the first gap, overlap or range
  /// outside of its file.
  [[nodiscard]] std::shared_ptr<const ExpertStore> build();

 private:
  struct Pending;
  std::unique_ptr<Pending> pending_;
};

}  // namespace sluice
