#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "store/expert_store.h"
#include "store/scatter.h"

namespace sluice {

/// One unit of reading: a range of one file (or parts of memory) that is read at once and
/// scattered.
struct ReadChunk {
  FileIdx file = FileIdx::kMemory;
  bool straight = false;  ///< O_DIRECT may read it into a 4096-aligned slot, without the bounce
  std::uint32_t num_parts = 0;
  std::uint64_t first_part = 0;     ///< in the plan's parts
  std::uint64_t offset = 0;         ///< of the first source byte in the file; memory: 0
  std::uint32_t bytes = 0;          ///< from the first source byte to behind the last
  std::uint32_t payload_bytes = 0;  ///< Σ bytes of its parts

  /// What the kernel is asked for: whole blocks of 4096.
  [[nodiscard]] std::uint64_t aligned_offset() const {
    return align_down(offset, kDirectAlignment);
  }
  [[nodiscard]] std::size_t aligned_bytes() const {
    return align_up(offset + bytes, kDirectAlignment) - aligned_offset();
  }
};

/// Ranges of one file that are nearer than this are one read: such a gap costs less than another
/// read does.
inline constexpr std::uint64_t kJoinGapBytes = 64 * kKiB;

/// Chunks of many experts, one behind the other.
struct ChunkPlan {
  std::vector<ReadChunk> chunks;
  std::vector<Scatter> parts;
};

/// Appends one expert's chunks: pieces in the order of their files, each file's ranges joined over
/// small gaps and cut at multiples of 4096 so that no chunk asks for more than `chunk_bytes` and
/// alignment; transposes at source rows (inside of one only where it is longer than a chunk), so
/// that each chunk can be scattered on its own. Pieces are valid (see ExpertStoreBuilder::build);
/// their sources may overlap.
void append_chunks(std::span<const Piece> pieces, DType layout_dtype, std::size_t chunk_bytes,
                   ChunkPlan& plan);

}  // namespace sluice
