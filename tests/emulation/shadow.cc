#include "tests/emulation/shadow.h"

#include <sys/mman.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>

namespace simt {

void* map_zeros(std::size_t bytes) {
  void* const memory = mmap(nullptr, bytes, PROT_READ | PROT_WRITE,
                            MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) {
    std::perror("emulation: no address space for the checks' memory");
    std::abort();
  }
  return memory;
}

RegionShadow::RegionShadow(std::size_t region_bytes)
    : bytes_(region_bytes),
      undefined_(static_cast<std::uint8_t*>(map_zeros(bytes_ / 8 + 1))),
      words_(static_cast<GlobalWord*>(map_zeros((bytes_ / 4 + 1) * sizeof(GlobalWord)))) {}

RegionShadow::~RegionShadow() {
  munmap(undefined_, bytes_ / 8 + 1);
  munmap(words_, (bytes_ / 4 + 1) * sizeof(GlobalWord));
}

void RegionShadow::forget_accesses() {
  madvise(words_, (bytes_ / 4 + 1) * sizeof(GlobalWord), MADV_DONTNEED);
}

void RegionShadow::set_undefined(std::size_t offset, std::size_t bytes, bool undefined) {
  const std::size_t end = offset + bytes;
  while (offset < end) {
    if (offset % 8 == 0 && end - offset >= 8) {
      const std::size_t whole = (end - offset) / 8;
      std::fill_n(undefined_ + offset / 8, whole, undefined ? std::uint8_t{0xFF} : std::uint8_t{0});
      offset += whole * 8;
      continue;
    }
    const auto bit = static_cast<std::uint8_t>(1u << offset % 8);
    std::uint8_t& byte = undefined_[offset / 8];
    byte = undefined ? byte | bit : byte & static_cast<std::uint8_t>(~bit);
    ++offset;
  }
}

bool RegionShadow::any_undefined(std::size_t offset, std::size_t bytes) const {
  const std::size_t end = offset + bytes;
  while (offset < end) {
    const std::size_t in_byte = std::min<std::size_t>(8 - offset % 8, end - offset);
    const unsigned mask = ((1u << in_byte) - 1u) << offset % 8;
    if ((undefined_[offset / 8] & mask) != 0) return true;
    offset += in_byte;
  }
  return false;
}

}  // namespace simt
