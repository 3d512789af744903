#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>
#include <map>
#include <random>
#include <string>
#include <vector>

#include "tests/emulation/fake_cuda.h"

namespace fake {

/// One range that copies or kernels may touch.
struct Allocation {
  enum class Kind { kDevice, kPinned, kRegistered };
  Kind kind = Kind::kDevice;
  int device = 0;  ///< whose memory, or which device was current when it was pinned
  char* base = nullptr;
  std::size_t bytes = 0;
  /// Unique since the start of the process: an address that was freed and given again is another
  /// allocation.
  std::uint64_t serial = 0;
  /// "cuda:0 allocation 3": the third cudaMalloc since `reset`.
  std::string name;
  // The pages that hold it, between guards; null for registered ranges, whose pages are the user's.
  char* pages = nullptr;
  std::size_t page_bytes = 0;

  [[nodiscard]] bool on_host() const { return kind != Kind::kDevice; }
};

/// The memory of all devices, and pinned memory.
///
/// Each allocation has pages of its own between guards of 16 MiB: with guards of one page an
/// overrun of 16 KB lands in a foreign mapping once in eight runs. It ends at its guard, so it is
/// aligned to 16 bytes where CUDA gives 256, or it is aligned to 256 and ends up to 255 bytes
/// early: the seed chooses, and sizes in multiples of 256 have both. Freed ranges stay unmapped
/// until the process ends, so a stale pointer never finds a new owner.
///
/// Thread safety: none; callers hold the runtime's lock.
class Memory {
 public:
  void reset(const Options& options);

  /// cudaErrorMemoryAllocation, and the reason in `why`, when the device or the pinned budget is
  /// exhausted. Contents are poison.
  cudaError_t allocate(Allocation::Kind kind, int device, std::size_t bytes, void** result,
                       std::string* why);
  /// The allocation that starts at `base`, of that kind, or null.
  [[nodiscard]] const Allocation* at(const void* base, Allocation::Kind kind) const;
  /// The live allocation that holds `address`, or null.
  [[nodiscard]] const Allocation* find(const void* address) const;
  /// The first live allocation of the host's that overlaps the range, or null.
  [[nodiscard]] const Allocation* find_overlap(const void* base, std::size_t bytes) const;
  void release(const Allocation& allocation);

  cudaError_t register_range(int device, void* base, std::size_t bytes, std::string* why);

  /// Opens the pages of one device for the step it takes, and closes those of the others.
  void open_for(int device);
  /// Closes what no Peek holds open.
  void close();
  void add_peek(int change);

  [[nodiscard]] std::size_t used_bytes(int device) const { return used_bytes_.at(device); }
  void add_to(Stats& stats) const;

 private:
  // Device pages are closed to the host in between: one mprotect per allocation.
  void apply_protection();
  void set_pages_open(const Allocation& allocation, bool open) const;
  [[nodiscard]] bool is_open(int device) const;

  Options options_;
  std::mt19937_64 rng_;
  std::map<std::uintptr_t, Allocation> live_;
  std::vector<std::size_t> used_bytes_;  // per device
  std::vector<int> named_;               // per device, for names
  int num_pinned_ = 0;
  int num_registered_ = 0;
  std::size_t pinned_bytes_ = 0;
  std::size_t peak_device_bytes_ = 0;
  std::size_t peak_pinned_bytes_ = 0;
  int open_device_ = -1;
  int peeks_ = 0;
  std::vector<bool> pages_open_;  // per device, as last applied
};

}  // namespace fake
