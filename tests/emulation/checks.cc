#include "tests/emulation/checks.h"

#include <algorithm>
#include <bit>
#include <cstring>

#include "tests/emulation/block.h"
#include "tests/emulation/constant_data.h"

namespace simt {
namespace {

bool reads(Access access) { return access != Access::kWrite && access != Access::kAtomicWrite; }
bool writes(Access access) { return access != Access::kRead && access != Access::kAtomicRead; }
bool is_atomic(Access access) { return access != Access::kRead && access != Access::kWrite; }
const char* verb(Access access) { return writes(access) ? "writes " : "reads "; }

// Bits [first, first + count) of a mask.
unsigned run_of_bits(std::size_t first, std::size_t count) { return ((1u << count) - 1u) << first; }

// g++ leaves a few stores uninstrumented (README, "Holes"): bytes that hold anything but the poison
// have been written by one of them.
bool still_poison(const char* byte) { return static_cast<unsigned char>(*byte) == 0xFF; }

// ---- shared memory ----

// Whether this lane and an access at (barrier, warp_epoch) by a thread of its warp, or of another,
// have something between them.
bool ordered(const Fiber& fiber, std::uint32_t barrier, bool same_warp, std::uint32_t warp_epoch) {
  return barrier != fiber.block->barrier_epoch || (same_warp && warp_epoch != fiber.warp_epoch);
}

// `who` number `other` has done something to it.
void report_shared_race(const char* p, Access access, const char* who, int other,
                        const char* has_done) {
  fail([&] {
    return "shared memory race: this thread " + std::string(verb(access)) + describe_for_kernel(p) +
           ", " + who + " " + std::to_string(other) + " " + has_done +
           " it, and no barrier or __syncwarp of both lies between";
  });
}

void check_against_write(const Fiber& fiber, const SharedCell& cell, unsigned mask, const char* p,
                         Access access) {
  if ((cell.written & mask) == 0 || cell.writer == fiber.linear) return;
  if (cell.write_was_atomic && is_atomic(access)) return;
  const bool same_warp = cell.writer / 32 == fiber.warp;
  if (ordered(fiber, cell.write_barrier, same_warp, cell.write_warp_epoch)) return;
  report_shared_race(p, access, "thread", cell.writer, "has written");
}

void check_against_reads(const Fiber& fiber, const SharedCell& cell, unsigned mask, const char* p,
                         Access access) {
  if ((cell.read & mask) == 0 || cell.read_barrier != fiber.block->barrier_epoch) return;
  const unsigned foreign = cell.reader_warps & ~(1u << fiber.warp);
  const bool last_is_foreign = cell.reader / 32 != fiber.warp;
  if (foreign != 0 && last_is_foreign) {
    report_shared_race(p, access, "thread", cell.reader, "has read");
  }
  if (foreign != 0) {
    report_shared_race(p, access, "warp", std::countr_zero(foreign), "has read");
  }
  if (cell.read_warp_epoch != fiber.warp_epoch) return;
  if (cell.reader != fiber.linear) {
    report_shared_race(p, access, "thread", cell.reader, "has read");
  }
  if (cell.several_lanes) {
    report_shared_race(p, access, "another lane of warp", fiber.warp, "has read");
  }
}

void record_shared_read(const Fiber& fiber, SharedCell& cell, unsigned mask) {
  const auto me = static_cast<std::uint16_t>(fiber.linear);
  // Readers of the same bytes add up. One of others replaces them: who read which byte would be
  // more than a cell holds, and a guess would report races that are none.
  const bool joins = cell.read_barrier == fiber.block->barrier_epoch && cell.read == mask;
  const bool same_warp_epoch =
      joins && cell.reader / 32 == fiber.warp && cell.read_warp_epoch == fiber.warp_epoch;
  cell.several_lanes = same_warp_epoch && (cell.several_lanes || cell.reader != me);
  cell.reader_warps = (joins ? cell.reader_warps : 0) | 1u << fiber.warp;
  cell.read = static_cast<std::uint8_t>(mask);
  cell.reader = me;
  cell.read_barrier = fiber.block->barrier_epoch;
  cell.read_warp_epoch = fiber.warp_epoch;
}

void record_shared_write(const Fiber& fiber, SharedCell& cell, unsigned mask, bool atomic) {
  const auto me = static_cast<std::uint16_t>(fiber.linear);
  const bool continues = cell.writer == me && cell.write_barrier == fiber.block->barrier_epoch &&
                         cell.write_warp_epoch == fiber.warp_epoch;
  cell.written = static_cast<std::uint8_t>((continues ? cell.written : 0) | mask);
  cell.writer = me;
  cell.write_barrier = fiber.block->barrier_epoch;
  cell.write_warp_epoch = fiber.warp_epoch;
  cell.write_was_atomic = atomic;
}

// The usual case at once: bytes that lie inside an object and have been written.
bool all_defined(const ByteState* states, std::size_t bytes) {
  static_assert(static_cast<int>(ByteState::kDefined) == 1);
  std::uint64_t word = 0;
  for (; bytes >= 8; bytes -= 8, states += 8) {
    std::memcpy(&word, states, 8);
    if (word != 0x0101010101010101u) return false;
  }
  for (; bytes > 0; --bytes, ++states) {
    if (*states != ByteState::kDefined) return false;
  }
  return true;
}

void check_bytes(const SharedShadow& shadow, std::size_t size, const char* base, const char* p,
                 std::size_t bytes, Access access) {
  const auto offset = static_cast<std::size_t>(p - base);
  for (std::size_t i = offset; i < offset + bytes; ++i) {
    if (i >= size || shadow.bytes[i] == ByteState::kGap) {
      fail([&] {
        return "out of bounds: this thread " + std::string(verb(access)) + std::to_string(bytes) +
               " bytes at " + describe_for_kernel(p);
      });
    }
    if (reads(access) && shadow.bytes[i] == ByteState::kUndefined && still_poison(base + i)) {
      fail([&] {
        return "uninitialised shared memory: this thread reads " + describe_for_kernel(p);
      });
    }
    shadow.bytes[i] = ByteState::kDefined;
  }
}

void check_shared(const SharedShadow& shadow, std::size_t size, const char* base, const char* p,
                  std::size_t bytes, Access access) {
  const Fiber& fiber = *current;
  const auto offset = static_cast<std::size_t>(p - base);
  const std::size_t end = offset + bytes;
  if (end > size || !all_defined(shadow.bytes + offset, bytes)) {
    check_bytes(shadow, size, base, p, bytes, access);
  }
  for (std::size_t first = offset; first < end;) {
    const std::size_t last = std::min(end, first / 4 * 4 + 4);
    const unsigned mask = run_of_bits(first % 4, last - first);
    SharedCell& cell = shadow.cells[first / 4];
    check_against_write(fiber, cell, mask, p, access);
    if (writes(access)) {
      check_against_reads(fiber, cell, mask, p, access);
      record_shared_write(fiber, cell, mask, is_atomic(access));
    } else if (!is_atomic(access)) {
      record_shared_read(fiber, cell, mask);
    }
    first = last;
  }
}

// ---- device and pinned memory ----

void report_global_race(const char* p, Access access, const char* verb_of_other, unsigned block) {
  fail([&] {
    return "global memory race: this thread " + std::string(verb(access)) + describe(p) +
           ", block " + std::to_string(block) + " " + verb_of_other +
           " it, and no __threadfence behind that and atomic of both orders them";
  });
}

bool knows(const Block& block, unsigned other, std::uint32_t serial) {
  const auto known = block.known.find(static_cast<int>(other));
  return known != block.known.end() && known->second >= serial;
}

// Whether an access joins an older one of the same block as one record. Not across a fence: the
// older one may have been published since, and the newer one not.
bool joins(const Block& block, std::uint16_t owner, std::uint32_t serial) {
  return owner == static_cast<std::uint16_t>(block.id) && serial > block.newest_fence;
}

void check_word(const Block& block, GlobalWord& word, unsigned mask, const char* p, Access access) {
  const auto me = static_cast<std::uint16_t>(block.id);
  if (word.grid != block.grid->epoch) {
    word = {};
    word.grid = block.grid->epoch;
  }
  if ((word.written & mask) != 0 && word.writer != me &&
      !(word.write_was_atomic && is_atomic(access)) &&
      !knows(block, word.writer, word.write_serial)) {
    report_global_race(p, access, "has written", word.writer);
  }
  if (writes(access)) {
    if ((word.read & mask) != 0 && word.reader != me &&
        !knows(block, word.reader, word.read_serial)) {
      report_global_race(p, access, "has read", word.reader);
    }
    const bool join =
        joins(block, word.writer, word.write_serial) && word.write_was_atomic == is_atomic(access);
    word.written = ((join ? word.written : 0) | mask) & 15u;
    word.writer = me;
    word.write_serial = block.grid->serial;
    word.write_was_atomic = is_atomic(access);
  } else if (!is_atomic(access)) {
    const bool join = joins(block, word.reader, word.read_serial);
    word.read = ((join ? word.read : 0) | mask) & 15u;
    word.reader = me;
    word.read_serial = block.grid->serial;
  }
}

void check_region(const Region& region, const char* p, std::size_t bytes, Access access) {
  Block& block = *current->block;
  const auto offset = static_cast<std::size_t>(p - region.base);
  if (offset + bytes > region.bytes) {
    fail([&] {
      return "out of bounds: this thread " + std::string(verb(access)) + std::to_string(bytes) +
             " bytes at " + describe(p);
    });
  }
  if (region.kind == RegionKind::kDevice && region.device != block.grid->device) {
    fail([&] {
      return "wrong device: this thread " + std::string(verb(access)) + describe(p) +
             " of device " + std::to_string(region.device) + ", its kernel runs on device " +
             std::to_string(block.grid->device);
    });
  }
  if (is_forbidden(p, bytes)) {
    fail([&] {
      return "forbidden bytes: this thread " + std::string(verb(access)) + std::to_string(bytes) +
             " bytes at " + describe(p) + ", which belong to nobody or to another slot";
    });
  }
  RegionShadow& shadow = *region.shadow;
  if (shadow.any_undefined(offset, bytes)) {
    if (reads(access)) {
      for (std::size_t i = 0; i < bytes; ++i) {
        if (shadow.undefined(offset + i) && still_poison(p + i)) {
          fail([&] { return "uninitialised memory: this thread reads " + describe(p + i); });
        }
      }
    }
    shadow.set_undefined(offset, bytes, false);
  }
  ++block.grid->serial;
  for (std::size_t first = offset; first < offset + bytes;) {
    const std::size_t last = std::min(offset + bytes, first / 4 * 4 + 4);
    check_word(block, shadow.word(first), run_of_bits(first % 4, last - first), p, access);
    first = last;
  }
}

// ---- everything else ----

void check_elsewhere(const char* p, std::size_t bytes, Access access) {
  const Block& block = *current->block;
  const auto* const args = static_cast<const char*>(block.grid->args.get());
  if (!writes(access)) {
    if (p >= args && p + bytes <= args + block.grid->arg_bytes) return;
    if (is_constant_data(p, bytes)) return;
  }
  const char* const arena = block.arena.static_base - kGuardBytes;
  if (p >= arena && p < block.arena.dynamic_end + kGuardBytes) {
    fail([&] {
      return "out of bounds: this thread " + std::string(verb(access)) + std::to_string(bytes) +
             " bytes at " + describe_for_kernel(p);
    });
  }
  const Region* const region = find_nearest_region(p);
  if (region != nullptr) {
    fail([&] {
      return std::string(region->freed ? "use after free" : "out of bounds") + ": this thread " +
             verb(access) + std::to_string(bytes) + " bytes at " + describe(p);
    });
  }
  fail([&] {
    return "host memory: this thread " + std::string(verb(access)) + describe(p) +
           "; kernels may touch device and pinned memory, their parameters and constants";
  });
}

}  // namespace

void check_access(const void* address, std::size_t bytes, Access access) {
  const Fiber& fiber = *current;
  const auto* const p = static_cast<const char*>(address);
  if (static_cast<std::size_t>(p - fiber.context.stack) < kStackBytes) return;
  ++counters().checked_accesses;
  Block& block = *fiber.block;
  const std::size_t dynamic_size = dynamic_bytes(block);
  const char* const dynamic = block.arena.dynamic_end - dynamic_size;
  if (static_cast<std::size_t>(p - dynamic) < dynamic_size) {
    return check_shared(block.arena.dynamic_shadow, dynamic_size, dynamic, p, bytes, access);
  }
  if (static_cast<std::size_t>(p - block.arena.static_base) < block.static_bytes) {
    return check_shared(block.arena.static_shadow, block.static_bytes, block.arena.static_base, p,
                        bytes, access);
  }
  if (const Region* const region = find_region(p); region != nullptr) {
    return check_region(*region, p, bytes, access);
  }
  check_elsewhere(p, bytes, access);
}

void poison_shared(Block& block, void* address, std::size_t bytes) {
  auto* const p = static_cast<char*>(address);
  std::memset(p, 0xFF, bytes);
  if (!checked()) return;
  const char* const dynamic = block.arena.dynamic_end - dynamic_bytes(block);
  ByteState* const states = p >= dynamic
                                ? block.arena.dynamic_shadow.bytes + (p - dynamic)
                                : block.arena.static_shadow.bytes + (p - block.arena.static_base);
  std::fill_n(states, bytes, ByteState::kUndefined);
}

}  // namespace simt
