#pragma once

#include <memory>

#include "device/device.h"
#include "engine/compute.h"

namespace sluice {

/// The arithmetic on a CUDA device, on whose memory `hidden`, `expert_ids`, `weights` and `out` of
/// a call lie; everything is enqueued on the call's stream, with one host wait, for the ids.
///
/// An expert of up to 16 rows goes to the decode pair, of more to the tile kernels; one of a site
/// with a callback always to the tile kernels, in two launches with the callback between, which
/// must enqueue on the same stream. Weights are read where they lie in slots; activations may be
/// wider (fp32 over bf16 or fp16).
///
/// Scratch is device memory beside the budget, counted as workspace: h [T · K, I], results
/// [T · K, H] fp32, rows by expert; it grows and is kept.
///
/// Errors: ConfigError for a width that is no multiple of 8 and for pointers that are not 16-byte
/// aligned; CapacityError when scratch is refused; in a build without CUDA, DeviceError when made.
[[nodiscard]] std::unique_ptr<ExpertCompute> make_cuda_compute(Device& device);

}  // namespace sluice
