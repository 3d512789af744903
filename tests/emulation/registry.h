#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>

namespace simt {

enum class RegionKind { kDevice, kPinned };

class RegionShadow;

/// One allocation that kernels may touch, or a freed one whose addresses are still known by name.
struct Region {
  char* base = nullptr;
  std::size_t bytes = 0;
  RegionKind kind = RegionKind::kDevice;
  int device = 0;
  bool freed = false;
  std::string tag;
  /// What the checks know of its bytes; null where accesses are not checked, and once freed.
  std::shared_ptr<RegionShadow> shadow;
};

// The memory that kernels may touch, and what is known of its bytes. The fake runtime fills it.
//
// Thread safety: none. Callers hold the lock under which device work runs; a kernel's accesses are
// looked up on the thread that steps its grid.

/// Makes [base, base + bytes) known. Pinned memory counts as defined, device memory as undefined
/// contents only after `poison`. Freed regions that overlap are forgotten.
void add_region(void* base, std::size_t bytes, RegionKind kind, const char* tag, int device = 0);

/// Marks the region that starts at `base` as freed: kernels may not touch it, reports still name
/// it.
void remove_region(void* base);

/// The same for memory that is the host's own again: the system may give its addresses to anybody,
/// so nothing is remembered of it.
void forget_region(void* base);

/// Forgets everything, freed regions and forbidden bytes too.
void clear_regions();

/// The live region that holds `address`, else null.
[[nodiscard]] const Region* find_region(const void* address);

/// The region, live or freed, that holds `address` or has it in the 16 MiB around it, else null.
[[nodiscard]] const Region* find_nearest_region(const void* address);

/// `address` for a report: "device slab+4096 of 8192 bytes (past the end)".
[[nodiscard]] std::string describe(const void* address);

/// Makes the contents undefined: 0xFF, a NaN in every float format and a wild pointer, and a mark
/// per byte where accesses are checked. The pages must be writable.
void poison(void* address, std::size_t bytes);

/// The other way: copies and memsets of the fake runtime say what they have written.
void mark_defined(const void* address, std::size_t bytes);

/// After a copy: every byte of `to` is as defined as its source. Memory that is no region counts
/// as defined.
void copy_definedness(const void* to, const void* from, std::size_t bytes);

/// Bytes that no kernel may touch although they lie inside a region: padding, the neighbour slot.
/// Reported where accesses are checked.
void forbid(const void* address, std::size_t bytes);
void clear_forbidden();

/// Which blocks have touched what, in every region: before an epoch is used again.
void forget_accesses();

[[nodiscard]] bool is_forbidden(const void* address, std::size_t bytes);

}  // namespace simt
