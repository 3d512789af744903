#pragma once

#include "base/mutex.h"

namespace sluice {

/// A Mutex that a fork of this process waits for: the child finds it free, and what it guards in
/// order. For what a child may use although another thread of the parent was inside.
///
/// None of them may be made, destroyed or taken while another one is held: a fork takes all.
class CAPABILITY("mutex") ForkMutex : public Mutex {
 public:
  ForkMutex();
  ~ForkMutex();
  ForkMutex(const ForkMutex&) = delete;
  ForkMutex& operator=(const ForkMutex&) = delete;
};

}  // namespace sluice
