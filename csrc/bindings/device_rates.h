#pragma once

#include <cstddef>
#include <vector>

#include "base/parallel.h"
#include "device/device.h"

// What the limit model asks of a GPU: the engine is not needed to measure it. A build without CUDA
// has device_rates_none.cc in the place of device_rates.cc.

namespace sluice::bindings {

/// How much is moved to measure with.
struct DeviceProbe {
  std::vector<std::size_t> copy_bytes;  ///< sizes of copies
  /// Of each series of copies, which has at least four; also of the memory that they go through,
  /// so that no cache holds what they read.
  std::size_t copy_total_bytes = 0;
  std::vector<int> depths;     ///< copies in flight: a series for each
  std::size_t read_bytes = 0;  ///< device memory that a kernel reads; at most half of what is free
  std::size_t host_bytes = 0;  ///< RAM that the host reads, alone and beside copies
  std::size_t pin_bytes = 0;   ///< RAM that is pinned, and copied into by one thread
  int repeats = 0;             ///< series, of which the median counts; fewer where each takes long
};

enum class CopyWay {
  kToDevice,   ///< from pinned memory
  kToHost,     ///< into pinned memory
  kFromPages,  ///< to the device from memory that is not pinned, one at a time
};

struct CopyTime {
  CopyWay way = CopyWay::kToDevice;
  int depth = 1;
  std::size_t bytes = 0;
  double seconds = 0;  ///< of one copy
};

struct DeviceRates {
  std::vector<CopyTime> copies;
  std::size_t read_bytes = 0;  ///< that were read in fact
  double memory_bytes_per_s = 0;
  double launch_s = 0;  ///< one empty kernel more in a full queue
  double round_trip_s =
      0;  ///< a kernel, its result on the host, and a copy back that waited for it
  double pin_bytes_per_s = 0;
  double staging_bytes_per_s = 0;             ///< one thread's memcpy into pinned memory
  double host_bytes_per_s = 0;                ///< read loop over RAM on `parallel`
  double host_beside_copies_bytes_per_s = 0;  ///< the same while copies to the device run
  double link_beside_reads_bytes_per_s = 0;   ///< what those got
};

/// Measures by the host's clock, around enough work; all memory is given back.
///
/// Thread safety: any thread, whose current CUDA device must be `device`.
/// Errors: ConfigError for a size, depth or count that is not positive; CapacityError where memory
/// is refused, or pinning is; DeviceError.
[[nodiscard]] DeviceRates measure_device(Device& device, ParallelFor& parallel,
                                         const DeviceProbe& probe);

}  // namespace sluice::bindings
