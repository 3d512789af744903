#pragma once

#include <string>

#include "tests/emulation/planted/planted.h"

namespace simt::planted {

// What a run ends in: "" for the right result, "NaN" or "wrong result", "spins", or the report of
// the grid that failed.

/// The product of a producer's x, which runs as late as a dependent launch allows, with small
/// integers, compared exactly. w is the last of two slots, or the first.
[[nodiscard]] std::string run_product(Bug bug, bool last_slot);

enum class Input {
  kDefined,
  kUndefined,
  kFreed,
  kHeap,
  kBss,
  kOtherDevice,
  kEndsEarly,  // four bytes short
  kEndsAtGap,  // four bytes of it are forbidden
  kNearNull,
  kConstants,
};
/// A kernel of one mechanism, `blocks` blocks of 64 threads.
[[nodiscard]] std::string run_mechanism(Kernel kernel, Input input = Input::kDefined,
                                        unsigned blocks = 1);
/// writing_kernel() on memory of this kind.
[[nodiscard]] std::string run_writing(Input target);

}  // namespace simt::planted
