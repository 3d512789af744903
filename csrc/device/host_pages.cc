#include "device/host_pages.h"

#include <sys/mman.h>
#include <sys/sysinfo.h>

#include <cerrno>
#include <cstring>
#include <limits>
#include <string>

#include "base/bytes.h"
#include "base/error.h"

namespace sluice {

SystemMemory system_memory() noexcept {
  struct sysinfo info = {};
  if (sysinfo(&info) != 0) return {};
  return {.free_bytes = std::uint64_t{info.freeram + info.bufferram} * info.mem_unit,
          .total_bytes = std::uint64_t{info.totalram} * info.mem_unit};
}

std::byte* map_host_pages(std::size_t bytes, std::string_view purpose, std::string_view advice) {
  void* pages = MAP_FAILED;
  int error_number = ENOMEM;
  if (bytes <= std::numeric_limits<std::size_t>::max() / 2) {
    pages = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    error_number = errno;
  }
  require<CapacityError>(pages != MAP_FAILED, [&] {
    return std::string(purpose) + ": got a refusal (" + std::strerror(error_number) + ") for " +
           std::to_string(bytes) + " bytes with " + std::to_string(system_memory().free_bytes) +
           " bytes of RAM free; " + std::string(advice);
  });
  // Best effort: kernels read a slab at up to a third more per second on huge pages, and pinning
  // one costs less.
  if (bytes >= 2 * kMiB) madvise(pages, bytes, MADV_HUGEPAGE);
  return static_cast<std::byte*>(pages);
}

void keep_from_children(std::byte* pages, std::size_t bytes) noexcept {
  madvise(pages, bytes, MADV_DONTFORK);
}

void unmap_host_pages(std::byte* pages, std::size_t bytes) noexcept { munmap(pages, bytes); }

}  // namespace sluice
