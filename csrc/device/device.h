#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>

namespace sluice {

/// A queue of device work. 0 is the caller's default queue; on a host device all are the same.
enum class StreamHandle : std::uint64_t {};

/// A point in a stream's work, drawn from the device's pool. Default: a point already passed.
enum class EventHandle : std::uint64_t {};

/// What plans and the engine may know of a device.
struct DeviceTraits {
  std::string name;
  /// Slots are ordinary memory that I/O threads may write: no copy engine, no staging.
  bool host_memory = true;
};

class Device;

/// Device or pinned memory that returns itself. Move-only; outlived by its device.
class DeviceBuffer {
 public:
  DeviceBuffer() = default;
  DeviceBuffer(Device* owner, std::byte* data, std::size_t bytes, bool pinned)
      : owner_(owner), data_(data), bytes_(bytes), pinned_(pinned) {}
  DeviceBuffer(DeviceBuffer&& other) noexcept;
  DeviceBuffer& operator=(DeviceBuffer&& other) noexcept;
  ~DeviceBuffer();
  [[nodiscard]] std::byte* data() const noexcept { return data_; }
  [[nodiscard]] std::size_t bytes() const noexcept { return bytes_; }

 private:
  Device* owner_ = nullptr;
  std::byte* data_ = nullptr;
  std::size_t bytes_ = 0;
  bool pinned_ = false;
};

/// Everything the core asks of an accelerator. Host memory implements it in device_host.cc, a build
/// without CUDA refuses it in device_none.cc, and tests single-step it with SteppedDevice.
///
/// Thread safety: every member may be called from any thread.
/// Errors: DeviceError naming the call; allocations that are refused throw CapacityError.
class Device {
 public:
  virtual ~Device() = default;

  [[nodiscard]] virtual DeviceTraits traits() const = 0;

  /// One slab for slots, 4096-aligned, on huge pages where the system grants them.
  [[nodiscard]] virtual DeviceBuffer allocate_slab(std::size_t bytes) = 0;
  /// Host memory that copies may start from without staging.
  [[nodiscard]] virtual DeviceBuffer allocate_pinned(std::size_t bytes) = 0;

  /// The queue that copies run on, apart from the caller's compute queue.
  [[nodiscard]] virtual StreamHandle copy_stream() = 0;
  /// Enqueues a copy of one chunk; the source stays valid until an event recorded behind it passed.
  virtual void copy_async(std::byte* target, const std::byte* source, std::size_t bytes,
                          StreamHandle stream) = 0;

  /// A point behind all that `stream` holds now.
  [[nodiscard]] virtual EventHandle record(StreamHandle stream) = 0;
  /// Later work of `stream` waits for `event`, without blocking the caller.
  virtual void wait(StreamHandle stream, EventHandle event) = 0;
  /// Blocks the calling thread until `event` passed.
  virtual void synchronize(EventHandle event) = 0;
  [[nodiscard]] virtual bool passed(EventHandle event) = 0;
  /// Gives the event back to the pool.
  virtual void release(EventHandle event) noexcept = 0;

 private:
  friend class DeviceBuffer;
  virtual void free_buffer(std::byte* data, std::size_t bytes, bool pinned) noexcept = 0;
};

/// RAM as the device: work is done when the call that enqueues it returns, events have passed.
[[nodiscard]] std::unique_ptr<Device> make_host_device();

/// The CUDA device `ordinal`.
/// Errors: DeviceError in a build without CUDA.
[[nodiscard]] std::unique_ptr<Device> make_cuda_device(int ordinal);

}  // namespace sluice
