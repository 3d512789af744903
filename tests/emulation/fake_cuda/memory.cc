#include "tests/emulation/fake_cuda/memory.h"

#include <sys/mman.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <cstring>

#include "tests/emulation/registry.h"

namespace fake {
namespace {

constexpr std::size_t kPage = 4096;
// Address space is free: see the class.
constexpr std::size_t kGuard = std::size_t{16} << 20;

std::size_t round_up(std::size_t bytes, std::size_t unit) {
  return (bytes + unit - 1) / unit * unit;
}

std::uintptr_t address_of(const void* pointer) { return reinterpret_cast<std::uintptr_t>(pointer); }

std::uint64_t next_serial() {
  static std::atomic<std::uint64_t> serial = 0;
  return ++serial;
}

}  // namespace

void Memory::reset(const Options& options) {
  while (!live_.empty()) release(live_.begin()->second);
  options_ = options;
  rng_.seed(options.seed * 0x9E3779B97F4A7C15u + 1);
  const auto devices = static_cast<std::size_t>(std::max(options.num_devices, 1));
  used_bytes_.assign(devices, 0);
  named_.assign(devices, 0);
  pages_open_.assign(devices, false);
  num_pinned_ = num_registered_ = 0;
  pinned_bytes_ = peak_device_bytes_ = peak_pinned_bytes_ = 0;
  open_device_ = -1;
}

cudaError_t Memory::allocate(Allocation::Kind kind, int device, std::size_t bytes, void** result,
                             std::string* why) {
  const bool on_device = kind == Allocation::Kind::kDevice;
  std::size_t& used = on_device ? used_bytes_.at(device) : pinned_bytes_;
  const std::size_t limit = on_device ? options_.device_bytes : options_.pinned_bytes;
  if (bytes > limit || used > limit - bytes) {
    *why = "got " + std::to_string(bytes) + " bytes, expected at most " +
           std::to_string(limit - std::min(used, limit)) + ": " + std::to_string(used) + " of " +
           std::to_string(limit) + " bytes are taken";
    return cudaErrorMemoryAllocation;
  }
  const std::size_t page_bytes = round_up(bytes, kPage);
  void* const map = mmap(nullptr, page_bytes + 2 * kGuard, PROT_NONE,
                         MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (map == MAP_FAILED) {
    *why = std::string("got no address space: ") + std::strerror(errno);
    return cudaErrorMemoryAllocation;
  }
  Allocation allocation;
  allocation.kind = kind;
  allocation.device = device;
  allocation.bytes = bytes;
  allocation.serial = next_serial();
  allocation.pages = static_cast<char*>(map) + kGuard;
  allocation.page_bytes = page_bytes;
  // The host's pages are locked in whole pages but handed out in pieces of 512.
  const std::size_t loose = on_device ? 256 : kPage;
  const std::size_t tight = on_device ? 16 : 512;
  allocation.base =
      allocation.pages + page_bytes - round_up(bytes, rng_() % 2 == 0 ? loose : tight);
  allocation.name = on_device ? "cuda:" + std::to_string(device) + " allocation " +
                                    std::to_string(++named_.at(device))
                              : "pinned allocation " + std::to_string(++num_pinned_);

  (void)mprotect(allocation.pages, page_bytes, PROT_READ | PROT_WRITE);
  simt::add_region(allocation.base, bytes,
                   on_device ? simt::RegionKind::kDevice : simt::RegionKind::kPinned,
                   allocation.name.c_str(), device);
  simt::poison(allocation.base, bytes);
  if (on_device) {
    if (options_.protect && !is_open(device)) set_pages_open(allocation, false);
  } else {
    simt::mark_defined(allocation.base, bytes);  // the host writes it, and nobody watches the host
  }
  used += bytes;
  if (on_device) {
    peak_device_bytes_ = std::max(peak_device_bytes_, used);
  } else {
    peak_pinned_bytes_ = std::max(peak_pinned_bytes_, used);
  }
  *result = allocation.base;
  live_.emplace(address_of(allocation.base), allocation);
  return cudaSuccess;
}

cudaError_t Memory::register_range(int device, void* base, std::size_t bytes, std::string* why) {
  if (base == nullptr || bytes == 0) {
    *why = "got an empty range, expected one of at least a byte";
    return cudaErrorInvalidValue;
  }
  if (const Allocation* other = find_overlap(base, bytes)) {
    *why = "got a range that overlaps " + other->name + ", expected one that is not pinned yet";
    return cudaErrorHostMemoryAlreadyRegistered;
  }
  if (bytes > options_.pinned_bytes || pinned_bytes_ > options_.pinned_bytes - bytes) {
    *why = "got " + std::to_string(bytes) + " bytes with " + std::to_string(pinned_bytes_) +
           " pinned, expected no more than " + std::to_string(options_.pinned_bytes) + " together";
    return cudaErrorMemoryAllocation;
  }
  Allocation allocation;
  allocation.kind = Allocation::Kind::kRegistered;
  allocation.device = device;
  allocation.base = static_cast<char*>(base);
  allocation.bytes = bytes;
  allocation.serial = next_serial();
  allocation.name = "registered range " + std::to_string(++num_registered_);
  simt::add_region(base, bytes, simt::RegionKind::kPinned, allocation.name.c_str(), device);
  simt::mark_defined(base, bytes);
  pinned_bytes_ += bytes;
  peak_pinned_bytes_ = std::max(peak_pinned_bytes_, pinned_bytes_);
  live_.emplace(address_of(base), allocation);
  return cudaSuccess;
}

const Allocation* Memory::at(const void* base, Allocation::Kind kind) const {
  const auto found = live_.find(address_of(base));
  return found != live_.end() && found->second.kind == kind ? &found->second : nullptr;
}

const Allocation* Memory::find(const void* address) const {
  auto found = live_.upper_bound(address_of(address));
  if (found == live_.begin()) return nullptr;
  const Allocation& allocation = (--found)->second;
  return address_of(address) - address_of(allocation.base) < allocation.bytes ? &allocation
                                                                              : nullptr;
}

const Allocation* Memory::find_overlap(const void* base, std::size_t bytes) const {
  if (const Allocation* holder = find(base)) return holder;
  const auto next = live_.lower_bound(address_of(base));
  return next != live_.end() && next->first - address_of(base) < bytes ? &next->second : nullptr;
}

void Memory::release(const Allocation& allocation) {
  const std::uintptr_t key = address_of(allocation.base);
  if (allocation.pages == nullptr) {
    simt::forget_region(allocation.base);  // was registered: the host's own pages
  } else {
    simt::remove_region(allocation.base);
    (void)mprotect(allocation.pages, allocation.page_bytes, PROT_NONE);
    (void)madvise(allocation.pages, allocation.page_bytes, MADV_DONTNEED);
  }
  (allocation.on_host() ? pinned_bytes_ : used_bytes_.at(allocation.device)) -= allocation.bytes;
  live_.erase(key);
}

void Memory::open_for(int device) {
  if (device == open_device_) return;
  open_device_ = device;
  apply_protection();
}

void Memory::close() {
  open_device_ = -1;
  apply_protection();
}

void Memory::add_peek(int change) {
  peeks_ += change;
  apply_protection();
}

bool Memory::is_open(int device) const { return peeks_ > 0 || device == open_device_; }

void Memory::apply_protection() {
  if (!options_.protect) return;
  for (std::size_t device = 0; device < pages_open_.size(); ++device) {
    const bool open = is_open(static_cast<int>(device));
    if (open == pages_open_[device]) continue;
    pages_open_[device] = open;
    for (const auto& [base, allocation] : live_) {
      if (!allocation.on_host() && allocation.device == static_cast<int>(device)) {
        set_pages_open(allocation, open);
      }
    }
  }
}

void Memory::set_pages_open(const Allocation& allocation, bool open) const {
  (void)mprotect(allocation.pages, allocation.page_bytes,
                 open ? PROT_READ | PROT_WRITE : PROT_NONE);
}

void Memory::add_to(Stats& stats) const {
  for (const auto& [base, allocation] : live_) {
    switch (allocation.kind) {
      case Allocation::Kind::kDevice:
        stats.device_bytes += allocation.bytes;
        ++stats.device_allocations;
        break;
      case Allocation::Kind::kPinned:
        stats.pinned_bytes += allocation.bytes;
        ++stats.pinned_allocations;
        break;
      case Allocation::Kind::kRegistered:
        stats.registered_bytes += allocation.bytes;
        ++stats.registered_ranges;
        break;
    }
  }
  stats.peak_device_bytes = peak_device_bytes_;
  stats.peak_pinned_bytes = peak_pinned_bytes_;
}

}  // namespace fake
