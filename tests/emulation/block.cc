#include "tests/emulation/block.h"

#include <sys/mman.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>

namespace simt {
namespace {

// Static objects may be small and many: as much again for their gaps.
constexpr std::size_t kStaticArena = 2 * kMaxStaticShared;
constexpr std::size_t kDynamicArena = kMaxDynamicShared + kGuardBytes - kMaxDynamicShared % 4096;

std::vector<Arena>& free_arenas() {
  static auto& arenas = *new std::vector<Arena>;
  return arenas;
}

SharedShadow map_shadow(std::size_t bytes) {
  return {.bytes = static_cast<ByteState*>(map_zeros(bytes)),
          .cells = static_cast<SharedCell*>(map_zeros(bytes / 4 * sizeof(SharedCell)))};
}

Arena take_arena() {
  auto& pool = free_arenas();
  if (!pool.empty()) {
    const Arena arena = pool.back();
    pool.pop_back();
    return arena;
  }
  const std::size_t bytes = kGuardBytes + kStaticArena + kGuardBytes + kDynamicArena + kGuardBytes;
  char* const base = static_cast<char*>(
      mmap(nullptr, bytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
  char* const static_base = base + kGuardBytes;
  char* const dynamic_base = static_base + kStaticArena + kGuardBytes;
  if (base == MAP_FAILED || mprotect(static_base, kStaticArena, PROT_READ | PROT_WRITE) != 0 ||
      mprotect(dynamic_base, kDynamicArena, PROT_READ | PROT_WRITE) != 0) {
    std::perror("emulation: no memory for the shared memory of a block");
    std::abort();
  }
  return {.static_base = static_base,
          .dynamic_end = dynamic_base + kDynamicArena,
          .static_shadow = checked() ? map_shadow(kStaticArena) : SharedShadow{},
          .dynamic_shadow = checked() ? map_shadow(kDynamicArena) : SharedShadow{}};
}

void run_thread() {
  entered();
  GridState& grid = *current->block->grid;
  grid.body(grid.args.get());
  leave_block(*current);
  current->state = State::kExited;
  suspend(current->context, true);
}

std::string offset_text(const char* kind, const char* name, std::ptrdiff_t offset,
                        std::size_t bytes) {
  return std::string(kind) + " " + name + (offset < 0 ? "" : "+") + std::to_string(offset) +
         " of " + std::to_string(bytes) + " bytes";
}

}  // namespace

const char* name_of(Collective kind) {
  switch (kind) {
    case Collective::kSyncWarp:
      return "__syncwarp";
    case Collective::kShuffle:
      return "shuffle";
    case Collective::kVote:
      return "vote";
    case Collective::kMma:
      return "mma";
    case Collective::kLdmatrix:
      return "ldmatrix";
  }
  return "";
}

std::unique_ptr<Block> make_block(GridState& grid, int id) {
  auto block = std::make_unique<Block>();
  block->grid = &grid;
  block->id = id;
  const auto number = static_cast<unsigned>(id);
  block->index = {number % grid.grid.x, number / grid.grid.x % grid.grid.y,
                  number / grid.grid.x / grid.grid.y};
  const unsigned threads = grid.block.x * grid.block.y * grid.block.z;
  block->live = static_cast<int>(threads);
  block->fibers.resize(threads);
  block->copies.resize(threads);
  block->warps.resize((threads + 31) / 32);
  block->arena = take_arena();
  block->barrier_epoch = next_barrier_epoch();
  std::memset(block->arena.dynamic_end - dynamic_bytes(*block), 0xFF, dynamic_bytes(*block));
  if (checked()) {
    ByteState* const states = block->arena.dynamic_shadow.bytes;
    std::fill(states, states + grid.shared_bytes, ByteState::kUndefined);
    std::fill(states + grid.shared_bytes, states + dynamic_bytes(*block), ByteState::kGap);
  }
  for (unsigned i = 0; i < threads; ++i) {
    Fiber& fiber = block->fibers[i];
    fiber.block = block.get();
    fiber.linear = static_cast<int>(i);
    fiber.lane = fiber.linear % 32;
    fiber.warp = fiber.linear / 32;
    fiber.index = {i % grid.block.x, i / grid.block.x % grid.block.y,
                   i / grid.block.x / grid.block.y};
    prepare(fiber.context, run_thread);
    block->warps[i / 32].ready |= 1u << i % 32;
  }
  for (Warp& warp : block->warps) warp.exited = ~warp.ready;
  return block;
}

std::uint32_t next_barrier_epoch() {
  static std::uint32_t newest = 0;
  return ++newest;
}

void drop(Block& block) {
  for (Fiber& fiber : block.fibers) release(fiber.context);
  free_arenas().push_back(block.arena);
}

// ---- shared memory ----

void* static_shared(const void* key, const char* name, std::size_t bytes, std::size_t alignment) {
  Block& block = *current->block;
  for (const StaticObject& object : block.objects) {
    if (object.key == key) return block.arena.static_base + object.offset;
  }
  const std::size_t offset = (block.static_bytes + alignment - 1) / alignment * alignment;
  block.static_payload += bytes;
  if (block.static_payload > kMaxStaticShared || offset + bytes + kStaticGap > kStaticArena) {
    fail([&] {
      return "static shared memory: got " + std::to_string(block.static_payload) + " bytes with " +
             name + ", expected at most " + std::to_string(kMaxStaticShared) +
             "; make it dynamic shared memory";
    });
  }
  const std::size_t used = std::exchange(block.static_bytes, offset + bytes + kStaticGap);
  block.objects.push_back({.key = key, .name = name, .offset = offset, .bytes = bytes});
  std::memset(block.arena.static_base + offset, 0xFF, bytes + kStaticGap);
  if (checked()) {
    ByteState* const states = block.arena.static_shadow.bytes;
    std::fill(states + used, states + offset, ByteState::kGap);
    std::fill(states + offset, states + offset + bytes, ByteState::kUndefined);
    std::fill(states + offset + bytes, states + block.static_bytes, ByteState::kGap);
  }
  return block.arena.static_base + offset;
}

unsigned char* dynamic_shared() {
  Block& block = *current->block;
  return reinterpret_cast<unsigned char*>(block.arena.dynamic_end - dynamic_bytes(block));
}

bool is_shared(const Block& block, const void* address) {
  const auto* const p = static_cast<const char*>(address);
  const char* const base = block.arena.static_base;
  return (p >= base && p < base + block.static_bytes) ||
         (p >= block.arena.dynamic_end - dynamic_bytes(block) && p < block.arena.dynamic_end);
}

// ---- reports ----

std::string to_string(Site site) {
  return std::string(site.file) + ":" + std::to_string(site.line);
}

std::string name_of(const Fiber& fiber) {
  const uint3 index = fiber.block->index;
  return std::string(fiber.block->grid->name) + " block (" + std::to_string(index.x) + "," +
         std::to_string(index.y) + "," + std::to_string(index.z) + ") thread " +
         std::to_string(fiber.linear);
}

void set_error(std::string what, Site site) {
  Fiber& fiber = *current;
  GridState& grid = *fiber.block->grid;
  grid.failed = true;
  grid.error = name_of(fiber) + ": " + what;
  if (site.line != 0) {
    grid.error += " [" + to_string(site) + "]";
  } else if (fiber.site.line != 0) {
    grid.error += " [after " + to_string(fiber.site) + "]";
  }
}

void leave_failed_grid() {
  suspend(current->context, true);
  std::abort();  // nobody resumes a thread of a failed grid
}

std::string describe_for_kernel(const void* address) {
  const Fiber& fiber = *current;
  const Block& block = *fiber.block;
  const auto* const p = static_cast<const char*>(address);
  const char* const stack = fiber.context.stack;
  if (p >= stack - kGuardBytes && p < stack) return "the end of its stack: it overflowed";
  const char* const dynamic = block.arena.dynamic_end - dynamic_bytes(block);
  if (p >= block.arena.static_base - kGuardBytes && p < block.arena.static_base + kStaticArena) {
    for (auto object = block.objects.rbegin(); object != block.objects.rend(); ++object) {
      const std::ptrdiff_t offset = p - (block.arena.static_base + object->offset);
      if (offset >= 0) return offset_text("shared", object->name, offset, object->bytes);
    }
    return "shared memory before every object";
  }
  if (p >= block.arena.static_base && p < block.arena.dynamic_end + kGuardBytes) {
    return offset_text("shared", "(dynamic)", p - dynamic, block.grid->shared_bytes);
  }
  return describe(address);
}

std::string describe_deadlock(const Block& block) {
  std::map<std::string, std::pair<int, int>> waiting;  // where -> how many, the first
  for (const Fiber& fiber : block.fibers) {
    std::string where;
    switch (fiber.state) {
      case State::kReady:
        where = "run";
        break;
      case State::kBarrier:
        where = "wait in __syncthreads at " + to_string(fiber.site);
        break;
      case State::kCollective:
        where =
            std::string("wait in ") + name_of(fiber.waiting_in) + " at " + to_string(fiber.site);
        break;
      case State::kDependency:
        where = "wait for the previous grid";
        break;
      case State::kSpin:
        where = "spin";
        break;
      case State::kExited:
        where = "have exited";
        break;
    }
    auto [entry, is_new] = waiting.try_emplace(where, 0, fiber.linear);
    ++entry->second.first;
  }
  std::string text;
  for (const auto& [where, who] : waiting) {
    text += (text.empty() ? "" : "; ") + std::to_string(who.first) + " threads (first " +
            std::to_string(who.second) + ") " + where;
  }
  return text;
}

}  // namespace simt
