#pragma once

// What the checks remember of memory. Only builds that look at accesses fill it.

#include <cstddef>
#include <cstdint>

namespace simt {

/// The last write and the last reads of four bytes of shared memory. Two accesses are ordered when
/// the block's barrier epochs differ or, within a warp, the lanes' warp epochs do. Zero: none yet;
/// barrier epochs are never used twice in a process, so a block inherits cells as they are.
struct SharedCell {
  std::uint32_t write_barrier = 0, write_warp_epoch = 0;
  std::uint32_t read_barrier = 0, read_warp_epoch = 0;
  /// Warps that have read since the barrier: a later reader does not hide an earlier one.
  std::uint32_t reader_warps = 0;
  std::uint16_t writer = 0, reader = 0;  // thread
  std::uint8_t written = 0, read = 0;    // which of the bytes
  bool write_was_atomic = false;
  /// Several lanes of the last reader's warp have read since its last __syncwarp.
  bool several_lanes = false;
};

enum class ByteState : std::uint8_t { kUndefined, kDefined, kGap };

/// One range of shared memory: a state per byte and a cell per four. Belongs to its arena.
struct SharedShadow {
  ByteState* bytes = nullptr;
  SharedCell* cells = nullptr;
};

/// The last write and the last read of four bytes of global memory, by one grid. Blocks are ordered
/// only by what they know of each other: a fence stamps a thread with the grid's serial, an atomic
/// or release behind it publishes the stamp at its address, and whoever reads that address
/// atomically knows it. A foreign write newer than what is known is a race.
struct GlobalWord {
  std::uint32_t write_serial = 0, read_serial = 0;
  std::uint16_t writer = 0, reader = 0;  // block, modulo 65536: a collision may hide a race
  std::uint16_t grid = 0;                // epoch; what other grids did is forgotten
  std::uint8_t written : 4 = 0;          // which of the bytes; 0: none
  std::uint8_t read : 4 = 0;
  bool write_was_atomic = false;
};
static_assert(sizeof(GlobalWord) == 16, "four to a cache line: this is the checks' hot loop");

/// Zeros without reserve: pages that nobody touches cost nothing.
[[nodiscard]] void* map_zeros(std::size_t bytes);

/// Of one region. Mapped without reserve and zero, so that bytes nobody touches cost nothing.
class RegionShadow {
 public:
  explicit RegionShadow(std::size_t region_bytes);
  ~RegionShadow();
  RegionShadow(const RegionShadow&) = delete;
  RegionShadow& operator=(const RegionShadow&) = delete;

  void set_undefined(std::size_t offset, std::size_t bytes, bool undefined);
  [[nodiscard]] bool any_undefined(std::size_t offset, std::size_t bytes) const;
  [[nodiscard]] bool undefined(std::size_t offset) const {
    return (undefined_[offset / 8] >> offset % 8 & 1) != 0;
  }
  [[nodiscard]] GlobalWord& word(std::size_t offset) { return words_[offset / 4]; }
  /// Every access so far.
  void forget_accesses();

 private:
  std::size_t bytes_ = 0;
  std::uint8_t* undefined_ = nullptr;  // a bit per byte
  GlobalWord* words_ = nullptr;
};

}  // namespace simt
