#pragma once

#include "base/clock.h"
#include "base/ids.h"

namespace sluice {

/// A guess that a layer will ask for an expert. May be dropped, late or wrong (law 4).
struct Hint {
  ExpertKey key{};
  double probability = 1.0;
  Nanos deadline = kNever;  ///< steady-clock time after which it is worthless
};

}  // namespace sluice
