#pragma once

namespace simt {

/// While it lives, faults of the calling thread belong to the kernel that runs: they become the
/// grid's error. Gives the thread its signal stack and installs the handlers at first use.
class DeviceWork {
 public:
  DeviceWork();
  ~DeviceWork();
  DeviceWork(const DeviceWork&) = delete;
  DeviceWork& operator=(const DeviceWork&) = delete;
};

/// Whether the calling thread is the one that runs a kernel, if any does: other host threads go on
/// meanwhile, and run inline functions of which the linker kept a kernel's own copy.
[[nodiscard]] bool on_device_thread();

}  // namespace simt
