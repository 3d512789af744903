#pragma once

#include <cstddef>

#include "tests/emulation/intrinsics.h"

namespace simt {

enum class Access {
  kRead,
  kWrite,
  /// No race among the three. kAtomic is a read and a write in one.
  kAtomic,
  kAtomicRead,
  kAtomicWrite,
};

/// In a build that checks accesses: is the running thread allowed this one? Bounds, forbidden and
/// undefined bytes, races. Reports end the grid.
void check_access(const void* address, std::size_t bytes, Access access);

struct Block;
/// Makes bytes of the block's shared memory undefined again.
void poison_shared(Block& block, void* address, std::size_t bytes);

/// In every build.
void check_alignment(const char* instruction, const void* address, std::size_t alignment,
                     Site site);

}  // namespace simt
