#include <cstring>

#include "device/device.h"
#include "device/host_pages.h"

namespace sluice {
namespace {

class HostDevice final : public Device {
 public:
  [[nodiscard]] DeviceTraits traits() const override {
    return {.name = "host", .slots_in_ram = true};
  }

  [[nodiscard]] DeviceBuffer allocate_slab(std::size_t bytes) override {
    return allocate(bytes, MemoryKind::kDevice, "slab of slots", "lower device_memory");
  }
  [[nodiscard]] DeviceBuffer allocate_host(std::size_t bytes) override {
    return allocate(bytes, MemoryKind::kHost, "host memory", "lower host_memory");
  }
  [[nodiscard]] bool pin(DeviceBuffer& buffer) override {
    set_kind(buffer, MemoryKind::kPinned);
    return true;
  }
  [[nodiscard]] MemoryInfo memory_info() override {
    const SystemMemory memory = system_memory();
    return {.free_bytes = memory.free_bytes, .total_bytes = memory.total_bytes};
  }

  [[nodiscard]] StreamHandle copy_stream() override { return StreamHandle{}; }
  void copy_async(std::byte* target, const std::byte* source, std::size_t bytes,
                  StreamHandle /*stream*/) override {
    if (bytes > 0) std::memcpy(target, source, bytes);
  }
  void read_async(std::byte* target, const std::byte* source, std::size_t bytes,
                  StreamHandle stream) override {
    copy_async(target, source, bytes, stream);
  }

  [[nodiscard]] EventHandle record(StreamHandle /*stream*/) override { return EventHandle{}; }
  void wait(StreamHandle /*stream*/, EventHandle /*event*/) override {}
  void synchronize(EventHandle /*event*/) override {}
  [[nodiscard]] bool passed(EventHandle /*event*/) override { return true; }
  void share(EventHandle /*event*/, int /*more*/) noexcept override {}
  void release(EventHandle /*event*/) noexcept override {}
  [[nodiscard]] bool is_capturing(StreamHandle /*stream*/) override { return false; }

 private:
  DeviceBuffer allocate(std::size_t bytes, MemoryKind kind, std::string_view purpose,
                        std::string_view advice) {
    if (bytes == 0) return {};
    return {this, map_host_pages(bytes, purpose, advice), bytes, kind};
  }
  void free_buffer(std::byte* data, std::size_t bytes, MemoryKind /*kind*/) noexcept override {
    unmap_host_pages(data, bytes);
  }
};

}  // namespace

std::unique_ptr<Device> make_host_device() { return std::make_unique<HostDevice>(); }

}  // namespace sluice
