#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>

#include "base/stream.h"

namespace sluice {

/// A point in a stream's work, drawn from the device's pool. Default: a point already passed.
enum class EventHandle : std::uint64_t {};

/// What plans and the engine may know of a device.
struct DeviceTraits {
  std::string name;
  /// Slots are ordinary memory that I/O threads may write: no copy engine, no staging.
  bool slots_in_ram = true;
  // Of an accelerator, for the plans of its kernels; 0 on a host device.
  int compute_capability = 0;  ///< major · 10 + minor
  int num_multiprocessors = 0;
  std::size_t shared_bytes_per_block = 0;  ///< the most that a block may opt into
};

class Device;

/// Where a buffer lies and who may read it.
enum class MemoryKind : std::uint8_t {
  kDevice,  ///< slots; the host must not touch it
  kHost,    ///< pages of the system: a copy from here needs staging
  kPinned,  ///< pages that the copy engine reads itself
};

/// Memory of a device, or of the host for it, that returns itself. Move-only; outlived by its
/// device.
class DeviceBuffer {
 public:
  DeviceBuffer() = default;
  DeviceBuffer(Device* owner, std::byte* data, std::size_t bytes, MemoryKind kind)
      : owner_(owner), data_(data), bytes_(bytes), kind_(kind) {}
  DeviceBuffer(DeviceBuffer&& other) noexcept;
  DeviceBuffer& operator=(DeviceBuffer&& other) noexcept;
  ~DeviceBuffer();
  [[nodiscard]] std::byte* data() const noexcept { return data_; }
  [[nodiscard]] std::size_t bytes() const noexcept { return bytes_; }
  [[nodiscard]] MemoryKind kind() const noexcept { return kind_; }

 private:
  friend class Device;
  Device* owner_ = nullptr;
  std::byte* data_ = nullptr;
  std::size_t bytes_ = 0;
  MemoryKind kind_ = MemoryKind::kHost;
};

/// Everything the core asks of an accelerator. Host memory implements it in device_host.cc, CUDA in
/// device_cuda.cc (device_none.cc where there is no toolkit), and tests single-step it with
/// SteppedDevice.
///
/// Thread safety: every member may be called from any thread.
/// Errors: DeviceError naming the call, its code and what it means; on CUDA the first one that
/// leaves the context unusable is kept, and later calls that fail throw it again. Allocations that
/// are refused throw CapacityError.
class Device {
 public:
  virtual ~Device() = default;

  [[nodiscard]] virtual DeviceTraits traits() const = 0;

  /// What a thread was before it worked on a device.
  struct ThreadState {
    int device = -1;
    int entered = -1;       ///< the device that it had entered; −1: none
    int capture_mode = -1;  ///< −1: it had entered this one
  };
  /// The calling thread works on this device until `leave_thread`: what it launches goes there, and
  /// it neither breaks nor is refused by captures that other streams are in. A thread of the core's
  /// own does not leave: the way back to another GPU would make a context on it. Cheap to repeat.
  virtual ThreadState enter_thread() { return {}; }
  virtual void leave_thread(const ThreadState& /*before*/) noexcept {}

  /// One slab for slots or scratch, 4096-aligned on a host device (on huge pages where the system
  /// grants them), 256-aligned on CUDA.
  [[nodiscard]] virtual DeviceBuffer allocate_slab(std::size_t bytes) = 0;
  /// Pages of the system, zeroed, 4096-aligned, on huge pages where granted; no page is touched.
  [[nodiscard]] virtual DeviceBuffer allocate_host(std::size_t bytes) = 0;
  /// Makes the pages of an `allocate_host` buffer such that copies need no staging. Costs the more
  /// the fewer of them were touched before: fill first. False: refused by the system; the buffer
  /// stays as it was.
  [[nodiscard]] virtual bool pin(DeviceBuffer& buffer) = 0;
  /// The two in one, for small buffers. Errors: CapacityError when either is refused.
  [[nodiscard]] DeviceBuffer allocate_pinned(std::size_t bytes);

  struct MemoryInfo {
    std::uint64_t free_bytes = 0;
    std::uint64_t total_bytes = 0;
  };
  /// Of the device, or of the RAM on a host device.
  [[nodiscard]] virtual MemoryInfo memory_info() = 0;

  /// The queue that copies run on, apart from the caller's compute queue.
  [[nodiscard]] virtual StreamHandle copy_stream() = 0;
  /// Enqueues a copy of one chunk to the device; the source, pinned, stays valid until an event
  /// recorded behind it passed.
  virtual void copy_async(std::byte* target, const std::byte* source, std::size_t bytes,
                          StreamHandle stream) = 0;
  /// The way back: `target` is pinned memory and holds the bytes once an event behind has passed.
  virtual void read_async(std::byte* target, const std::byte* source, std::size_t bytes,
                          StreamHandle stream) = 0;

  /// A point behind all that `stream` holds now.
  [[nodiscard]] virtual EventHandle record(StreamHandle stream) = 0;
  /// Later work of `stream` waits for `event`, without blocking the caller.
  virtual void wait(StreamHandle stream, EventHandle event) = 0;
  /// Blocks the calling thread until `event` passed.
  virtual void synchronize(EventHandle event) = 0;
  [[nodiscard]] virtual bool passed(EventHandle event) = 0;
  /// The event has `more` owners beside its present ones; the last `release` counts.
  virtual void share(EventHandle event, int more) noexcept = 0;
  /// Gives the event back to the pool, if it is one. Waits that were enqueued on it stand.
  virtual void release(EventHandle event) noexcept = 0;
  /// Whether work on `stream` is being recorded into a graph instead of running.
  [[nodiscard]] virtual bool is_capturing(StreamHandle stream) = 0;

  /// Gives streams and events back before the device's own end. Its buffers are free by then, and
  /// nothing but `release` follows. Idempotent.
  virtual void close() noexcept {}

 protected:
  /// What `pin` of a device changes in a buffer of its own.
  static void set_kind(DeviceBuffer& buffer, MemoryKind kind) noexcept { buffer.kind_ = kind; }

 private:
  friend class DeviceBuffer;
  virtual void free_buffer(std::byte* data, std::size_t bytes, MemoryKind kind) noexcept = 0;
};

/// `enter_thread`, and back at the end of the scope.
class DeviceScope {
 public:
  explicit DeviceScope(Device& device) : device_(device), before_(device.enter_thread()) {}
  ~DeviceScope() { device_.leave_thread(before_); }
  DeviceScope(const DeviceScope&) = delete;
  DeviceScope& operator=(const DeviceScope&) = delete;

 private:
  Device& device_;
  const Device::ThreadState before_;
};

/// RAM as the device: work is done when the call that enqueues it returns, events have passed.
[[nodiscard]] std::unique_ptr<Device> make_host_device();

/// The CUDA device `ordinal`.
/// Errors: DeviceError in a build without CUDA, without a driver, or where there is no such device.
[[nodiscard]] std::unique_ptr<Device> make_cuda_device(int ordinal);

/// How many CUDA devices this process sees; 0 in a build without CUDA and without a driver.
[[nodiscard]] int num_cuda_devices() noexcept;

/// What the CUDA runtime tells of a device without a context on it, which would take its memory.
struct CudaDeviceFacts {
  std::string pci_address;     ///< as sysfs spells it: "0000:3b:00.0"
  int compute_capability = 0;  ///< major · 10 + minor
  int num_multiprocessors = 0;
  int driver_cuda_version = 0;  ///< the newest CUDA of the driver: major · 1000 + minor · 10
};
/// Errors: DeviceError as `make_cuda_device`.
[[nodiscard]] CudaDeviceFacts cuda_device_facts(int ordinal);

}  // namespace sluice
