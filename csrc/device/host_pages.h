#pragma once

#include <cstddef>
#include <cstdint>
#include <string_view>

namespace sluice {

/// Zeroed pages of the system, 4096-aligned, on huge pages where granted; none is touched.
/// Errors: CapacityError naming `purpose`, what was asked for, what is free, and `advice`.
[[nodiscard]] std::byte* map_host_pages(std::size_t bytes, std::string_view purpose,
                                        std::string_view advice);
/// A process forked from now on does not get these pages. Best effort.
void keep_from_children(std::byte* pages, std::size_t bytes) noexcept;
void unmap_host_pages(std::byte* pages, std::size_t bytes) noexcept;

struct SystemMemory {
  std::uint64_t free_bytes = 0;  ///< that programs may take now, caches included; 0: not known
  std::uint64_t total_bytes = 0;
};
[[nodiscard]] SystemMemory system_memory() noexcept;

}  // namespace sluice
