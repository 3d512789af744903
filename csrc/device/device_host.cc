#include <sys/mman.h>
#include <sys/sysinfo.h>

#include <cerrno>
#include <cstring>
#include <limits>
#include <string>

#include "base/bytes.h"
#include "base/error.h"
#include "device/device.h"

namespace sluice {
namespace {

/// RAM that programs may take now, or 0 where the system does not say.
std::uint64_t free_ram_bytes() {
  struct sysinfo info = {};
  return sysinfo(&info) == 0 ? std::uint64_t{info.freeram + info.bufferram} * info.mem_unit : 0;
}

/// Zeroed pages of the system: 4096-aligned, given back whole.
std::byte* map_pages(std::size_t bytes, std::string_view purpose) {
  void* pages = MAP_FAILED;
  int error_number = ENOMEM;
  if (bytes <= std::numeric_limits<std::size_t>::max() / 2) {
    pages = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    error_number = errno;
  }
  require<CapacityError>(pages != MAP_FAILED, [&] {
    return std::string(purpose) + ": got a refusal (" + std::strerror(error_number) + ") for " +
           std::to_string(bytes) + " bytes with " + std::to_string(free_ram_bytes()) +
           " bytes of RAM free; lower device_memory";
  });
  // Best effort: kernels read a slab at up to a third more per second on huge pages.
  if (bytes >= 2 * kMiB) madvise(pages, bytes, MADV_HUGEPAGE);
  return static_cast<std::byte*>(pages);
}

class HostDevice final : public Device {
 public:
  [[nodiscard]] DeviceTraits traits() const override {
    return {.name = "host", .host_memory = true};
  }

  [[nodiscard]] DeviceBuffer allocate_slab(std::size_t bytes) override {
    return allocate(bytes, false, "slab of slots");
  }
  [[nodiscard]] DeviceBuffer allocate_pinned(std::size_t bytes) override {
    return allocate(bytes, true, "pinned arena");
  }

  [[nodiscard]] StreamHandle copy_stream() override { return StreamHandle{}; }
  void copy_async(std::byte* target, const std::byte* source, std::size_t bytes,
                  StreamHandle /*stream*/) override {
    if (bytes > 0) std::memcpy(target, source, bytes);
  }

  [[nodiscard]] EventHandle record(StreamHandle /*stream*/) override { return EventHandle{}; }
  void wait(StreamHandle /*stream*/, EventHandle /*event*/) override {}
  void synchronize(EventHandle /*event*/) override {}
  [[nodiscard]] bool passed(EventHandle /*event*/) override { return true; }
  void release(EventHandle /*event*/) noexcept override {}

 private:
  DeviceBuffer allocate(std::size_t bytes, bool pinned, std::string_view purpose) {
    if (bytes == 0) return {};
    return {this, map_pages(bytes, purpose), bytes, pinned};
  }
  void free_buffer(std::byte* data, std::size_t bytes, bool /*pinned*/) noexcept override {
    munmap(data, bytes);
  }
};

}  // namespace

std::unique_ptr<Device> make_host_device() { return std::make_unique<HostDevice>(); }

}  // namespace sluice
