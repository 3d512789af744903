#pragma once

#include <memory>

#include "base/ranges.h"

namespace sluice {

/// Ranges of NVTX, in the domain "sluice": for Nsight Systems, and whatever else listens to them.
/// The listener is loaded with the first call here, by the paths that NVTX documents; where there
/// is none the log says so.
/// Errors: ConfigError in a build without CUDA, or whose CUDA headers lack those of NVTX.
[[nodiscard]] std::unique_ptr<Ranges> make_nvtx_ranges();

}  // namespace sluice
