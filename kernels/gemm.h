#pragma once

#include <cstdint>

#include "base/dtype.h"

namespace sluice {

/// c[m, n] = a[m, k] · b[n, k]^T in the arithmetic of `dtype`, row-major; rows of c are `ldc`
/// elements apart, a and b are contiguous. b is 64-byte aligned (law 1).
struct GemmCall {
  DType dtype;
  std::int64_t m, n, k;
  const void* a;
  const void* b;
  void* c;
  std::int64_t ldc;
};

/// Who multiplies for many tokens: torch through the bridge, or the reference below. Returns 0, or
/// a code that the engine turns into an error.
using GemmFn = int (*)(void* context, const GemmCall& call);

/// The definition, slow: fp32 accumulation in ascending k, one rounding to `dtype`. For C++ tests.
int reference_gemm(void* context, const GemmCall& call);

}  // namespace sluice
