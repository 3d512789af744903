#pragma once

#include <cstdint>

#include "base/dtype.h"
#include "base/parallel.h"

namespace sluice {

/// out[t] = Σ_k weight[t, k] · rows[t, k], by fused multiply-add in k order in fp32, starting from
/// zero, one rounding to `out_dtype`. Entries whose `valid` byte is 0 contribute nothing.
///
/// Shapes: rows [T, K, H] f32, weights [T, K] f32, valid [T, K], out [T, H].
void combine(const float* rows, const float* weights, const std::uint8_t* valid,
             std::int64_t num_tokens, std::int64_t top_k, std::int64_t hidden, DType out_dtype,
             void* out, ParallelFor& parallel);

}  // namespace sluice
