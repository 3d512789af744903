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

}  // namespace simt
