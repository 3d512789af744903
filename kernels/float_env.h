#pragma once

#if defined(__x86_64__)
#include <xmmintrin.h>
#endif

namespace sluice {

/// Round to nearest, subnormals kept, for a scope: a caller that flushes subnormals on its own
/// thread would else get other bits there than on a pool's threads (law 1).
class DefaultFloatEnv {
 public:
  DefaultFloatEnv(const DefaultFloatEnv&) = delete;
  DefaultFloatEnv& operator=(const DefaultFloatEnv&) = delete;
#if defined(__x86_64__)
  DefaultFloatEnv() : saved_(_mm_getcsr()) { _mm_setcsr(0x1f80); }
  ~DefaultFloatEnv() { _mm_setcsr(saved_); }

 private:
  unsigned saved_;
#else
  DefaultFloatEnv() {}
#endif
};

}  // namespace sluice
