#pragma once

namespace sluice {

/// Whether kernels of this build may be launched with `overlap_previous` on the current device: it
/// is of sm_90 or newer, and so is the code that was loaded for it. Code that was translated for it
/// at run time from PTX of an older architecture has no `griddepcontrol.wait` in it: it would begin
/// early and wait for nothing.
///
/// Errors: DeviceError naming the call and the runtime's error.
[[nodiscard]] bool supports_dependent_launch();

}  // namespace sluice
