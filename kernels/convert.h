#pragma once

#include <cstdint>

#include "base/dtype.h"

namespace sluice {

/// out[i] = fp32 of in[i], exact.
void widen(DType dtype, const void* in, float* out, std::int64_t count);
/// out[i] = in[i] in `dtype`, round to nearest even.
void narrow(DType dtype, const float* in, void* out, std::int64_t count);

}  // namespace sluice
