#include "tests/emulation/registry.h"

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <map>

#include "tests/emulation/shadow.h"
#include "tests/emulation/simt.h"

namespace simt {
namespace {

// How far from a region an address is still named after it: the guards around device memory.
constexpr std::uintptr_t kNearBytes = std::uintptr_t{16} << 20;

struct Registry {
  std::map<std::uintptr_t, Region> regions;
  std::map<std::uintptr_t, std::uintptr_t> forbidden;  // first byte -> one past the last
  const Region* newest_hit = nullptr;                  // kernels stay in one region for long
};

Registry& registry() {
  static auto& instance = *new Registry;  // faults may come while statics are destroyed
  return instance;
}

std::uintptr_t number(const void* address) { return reinterpret_cast<std::uintptr_t>(address); }

bool holds(const Region& region, const void* address) {
  return number(address) - number(region.base) < region.bytes;
}

}  // namespace

void add_region(void* base, std::size_t bytes, RegionKind kind, const char* tag, int device) {
  Registry& r = registry();
  r.newest_hit = nullptr;
  std::erase_if(r.regions, [&](const auto& entry) {
    const Region& old = entry.second;
    return old.freed && number(old.base) < number(base) + bytes &&
           number(base) < number(old.base) + old.bytes;
  });
  Region region{.base = static_cast<char*>(base),
                .bytes = bytes,
                .kind = kind,
                .device = device,
                .freed = false,
                .tag = tag,
                .shadow = nullptr};
  if (checked()) region.shadow = std::make_shared<RegionShadow>(bytes);
  r.regions[number(base)] = std::move(region);
}

void remove_region(void* base) {
  Registry& r = registry();
  r.newest_hit = nullptr;
  const auto entry = r.regions.find(number(base));
  if (entry == r.regions.end()) return;
  entry->second.freed = true;
  entry->second.shadow = nullptr;
}

void forget_region(void* base) {
  Registry& r = registry();
  r.newest_hit = nullptr;
  r.regions.erase(number(base));
}

void clear_regions() { registry() = {}; }

const Region* find_region(const void* address) {
  Registry& r = registry();
  if (r.newest_hit != nullptr && holds(*r.newest_hit, address)) return r.newest_hit;
  auto entry = r.regions.upper_bound(number(address));
  if (entry == r.regions.begin()) return nullptr;
  --entry;
  if (entry->second.freed || !holds(entry->second, address)) return nullptr;
  return r.newest_hit = &entry->second;
}

const Region* find_nearest_region(const void* address) {
  Registry& r = registry();
  const auto above = r.regions.upper_bound(number(address));
  const Region* nearest = nullptr;
  std::uintptr_t distance = kNearBytes;
  if (above != r.regions.begin()) {
    const Region& below = std::prev(above)->second;
    if (holds(below, address)) return &below;
    const std::uintptr_t past = number(address) - (number(below.base) + below.bytes);
    if (past < distance) {
      nearest = &below;
      distance = past;
    }
  }
  if (above != r.regions.end() && above->first - number(address) < distance) {
    nearest = &above->second;
  }
  return nearest;
}

std::string describe(const void* address) {
  char digits[32];
  std::snprintf(digits, sizeof(digits), "%p", address);
  const Region* const region = find_nearest_region(address);
  if (region == nullptr) return std::string(digits) + " (no device or pinned memory)";
  const auto offset = static_cast<std::intptr_t>(number(address) - number(region->base));
  const bool past = offset >= static_cast<std::intptr_t>(region->bytes);
  return std::string(region->kind == RegionKind::kDevice ? "device " : "pinned ") + region->tag +
         (offset < 0 ? "" : "+") + std::to_string(offset) + " of " + std::to_string(region->bytes) +
         " bytes" + (region->freed ? " (freed)" : "") +
         (past         ? " (past the end)"
          : offset < 0 ? " (before the start)"
                       : "");
}

void poison(void* address, std::size_t bytes) {
  std::memset(address, 0xFF, bytes);
  const Region* const region = find_region(address);
  if (region == nullptr || region->shadow == nullptr) return;
  const auto offset = static_cast<std::size_t>(static_cast<char*>(address) - region->base);
  region->shadow->set_undefined(offset, std::min(bytes, region->bytes - offset), true);
}

void mark_defined(const void* address, std::size_t bytes) {
  const Region* const region = find_region(address);
  if (region == nullptr || region->shadow == nullptr) return;
  const auto offset = static_cast<std::size_t>(static_cast<const char*>(address) - region->base);
  region->shadow->set_undefined(offset, std::min(bytes, region->bytes - offset), false);
}

void copy_definedness(const void* to, const void* from, std::size_t bytes) {
  const Region* const source = find_region(from);
  mark_defined(to, bytes);
  if (source == nullptr || source->shadow == nullptr) return;
  const Region* const target = find_region(to);
  if (target == nullptr || target->shadow == nullptr) return;
  const auto first = static_cast<std::size_t>(static_cast<const char*>(from) - source->base);
  const auto first_to = static_cast<std::size_t>(static_cast<const char*>(to) - target->base);
  bytes = std::min({bytes, source->bytes - first, target->bytes - first_to});
  for (std::size_t i = 0; i < bytes; ++i) {
    if (source->shadow->undefined(first + i)) target->shadow->set_undefined(first_to + i, 1, true);
  }
}

void forbid(const void* address, std::size_t bytes) {
  if (bytes > 0) registry().forbidden[number(address)] = number(address) + bytes;
}

void clear_forbidden() { registry().forbidden.clear(); }

void forget_accesses() {
  for (auto& [address, region] : registry().regions) {
    if (region.shadow != nullptr) region.shadow->forget_accesses();
  }
}

bool is_forbidden(const void* address, std::size_t bytes) {
  const auto& forbidden = registry().forbidden;
  if (forbidden.empty()) return false;
  const auto above = forbidden.lower_bound(number(address) + bytes);
  return above != forbidden.begin() && std::prev(above)->second > number(address);
}

}  // namespace simt
