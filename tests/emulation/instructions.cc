// Loads, copies and fences: the instructions of kernels/ptx.h in which one thread acts alone.

#include <algorithm>
#include <cstring>

#include "tests/emulation/block.h"
#include "tests/emulation/checks.h"

namespace simt {
namespace {

CopyQueue& queue_of(const Fiber& fiber) {
  return fiber.block->copies[static_cast<std::size_t>(fiber.linear)];
}

void land(const PendingCopy& copy) {
  const auto bytes = static_cast<std::size_t>(copy.from_bytes);
  if (checked()) {
    if (bytes > 0) check_access(copy.from, bytes, Access::kRead);
    check_access(copy.to, 16, Access::kWrite);
  }
  std::memcpy(copy.to, copy.from, bytes);
  std::memset(static_cast<char*>(copy.to) + bytes, 0, 16 - bytes);
}

/// A fence's stamp goes to whoever reads `address` atomically, and with it what this block knows.
void publish(const Fiber& fiber, const void* address) {
  Block& block = *fiber.block;
  auto& stamps = block.grid->published[address];
  const auto raise = [&](int id, std::uint32_t serial) {
    std::uint32_t& stamp = stamps[id];
    stamp = std::max(stamp, serial);
  };
  raise(block.id, fiber.fenced);
  for (const auto& [id, serial] : block.known) raise(id, serial);
}

void learn(Block& block, const void* address) {
  const auto stamps = block.grid->published.find(address);
  if (stamps == block.grid->published.end()) return;
  for (const auto& [id, serial] : stamps->second) {
    std::uint32_t& known = block.known[id];
    known = std::max(known, serial);
  }
}

}  // namespace

void check_alignment(const char* instruction, const void* address, std::size_t alignment,
                     Site site) {
  if (reinterpret_cast<std::uintptr_t>(address) % alignment == 0) return;
  fail(site, [&] {
    return std::string(instruction) + ": got " + describe_for_kernel(address) +
           ", expected an address aligned to " + std::to_string(alignment) + " bytes";
  });
}

uint4 load_16_bytes(const void* address, Site site) {
  current->site = site;
  check_alignment("load_stream", address, 16, site);
  if (is_shared(*current->block, address)) {
    fail(site, [&] {
      return "load_stream: got " + describe_for_kernel(address) + ", expected global memory";
    });
  }
  if (checked()) check_access(address, 16, Access::kRead);
  uint4 value;
  std::memcpy(&value, address, 16);
  return value;
}

// ---- cp.async ----

void cp_async_16(void* to, const void* from, int from_bytes, Site site) {
  Fiber& fiber = *current;
  ++counters().cp_async;
  fiber.site = site;
  check_alignment("cp.async target", to, 16, site);
  check_alignment("cp.async source", from, 16, site);
  if (from_bytes < 0 || from_bytes > 16) {
    fail(site, [&] {
      return "cp.async: got " + std::to_string(from_bytes) + " source bytes, expected 0 to 16";
    });
  }
  if (!is_shared(*fiber.block, to)) {
    fail(site, [&] {
      return "cp.async target: got " + describe_for_kernel(to) + ", expected shared memory";
    });
  }
  if (is_shared(*fiber.block, from)) {
    fail(site, [&] {
      return "cp.async source: got " + describe_for_kernel(from) + ", expected global memory";
    });
  }
  CopyQueue& queue = queue_of(fiber);
  const PendingCopy copy{.to = to,
                         .from = from,
                         .from_bytes = from_bytes,
                         .group = queue.committed_groups,
                         .site = site};
  if (!options().late_cp_async) return land(copy);
  // The copy may land at any time from here on: whoever reads before the wait gets poison, whoever
  // still reads the old contents is in a race with a write.
  if (checked()) check_access(to, 16, Access::kWrite);
  poison_shared(*fiber.block, to, 16);
  queue.pending.push_back(copy);
}

void cp_async_commit() { ++queue_of(*current).committed_groups; }

void cp_async_wait(int pending) {
  CopyQueue& queue = queue_of(*current);
  const int landed = queue.committed_groups - pending;
  // Groups are closed in order, so what lands is a prefix.
  const auto end = std::find_if(queue.pending.begin(), queue.pending.end(),
                                [=](const PendingCopy& copy) { return copy.group >= landed; });
  std::for_each(queue.pending.begin(), end, land);
  queue.pending.erase(queue.pending.begin(), end);
}

// ---- fences and atomics ----

void fence() { current->fenced = current->block->newest_fence = ++current->block->grid->serial; }

void atomic_access(const void* address, std::size_t bytes, bool changes) {
  if (changes) {
    ++current->block->grid->changes;
  } else {
    spin();
  }
  if (!checked()) return;
  check_access(address, bytes, Access::kAtomic);
  if (current->fenced != 0) publish(*current, address);
  learn(*current->block, address);
}

std::uint32_t load_acquire(const std::uint32_t* address, Site site) {
  current->site = site;
  check_alignment("load_acquire", address, 4, site);
  spin();
  if (checked()) {
    check_access(address, 4, Access::kAtomicRead);
    learn(*current->block, address);
  }
  return __atomic_load_n(address, __ATOMIC_ACQUIRE);
}

void store_release(std::uint32_t* address, std::uint32_t value, Site site) {
  current->site = site;
  check_alignment("store_release", address, 4, site);
  ++current->block->grid->changes;
  if (checked()) {
    check_access(address, 4, Access::kAtomicWrite);
    fence();
    publish(*current, address);
  }
  __atomic_store_n(address, value, __ATOMIC_RELEASE);
}

}  // namespace simt
