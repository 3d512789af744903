#include "tests/emulation/constant_data.h"

#include <elf.h>
#include <link.h>

#include <cstdint>
#include <vector>

namespace simt {
namespace {

struct Range {
  std::uintptr_t begin, end;
};

// Segments that are never writable, and those that the loader writes once (RELRO).
int collect(dl_phdr_info* object, std::size_t /*size*/, void* ranges) {
  for (int i = 0; i < object->dlpi_phnum; ++i) {
    const auto& segment = object->dlpi_phdr[i];
    const bool constant = (segment.p_type == PT_LOAD && (segment.p_flags & PF_W) == 0) ||
                          segment.p_type == PT_GNU_RELRO;
    if (!constant) continue;
    const std::uintptr_t begin = object->dlpi_addr + segment.p_vaddr;
    static_cast<std::vector<Range>*>(ranges)->push_back({begin, begin + segment.p_memsz});
  }
  return 0;
}

bool inside(const std::vector<Range>& ranges, std::uintptr_t begin, std::uintptr_t end) {
  for (const Range& range : ranges) {
    if (begin >= range.begin && end <= range.end) return true;
  }
  return false;
}

}  // namespace

bool is_constant_data(const void* address, std::size_t bytes) {
  static std::vector<Range> known;
  const auto begin = reinterpret_cast<std::uintptr_t>(address);
  if (inside(known, begin, begin + bytes)) return true;
  std::vector<Range> now;  // a library may have come since
  dl_iterate_phdr(collect, &now);
  known = std::move(now);
  return inside(known, begin, begin + bytes);
}

}  // namespace simt
