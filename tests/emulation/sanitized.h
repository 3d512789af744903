#pragma once

namespace sluice::testing {

/// Sanitizers look at the host's code, take ten times as long, and see no more of it where only the
/// order of a kernel's threads or the rounding of its sums is another: sweeps are thinner there,
/// never narrower.
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
inline constexpr bool kSanitized = true;
#else
inline constexpr bool kSanitized = false;
#endif

}  // namespace sluice::testing
