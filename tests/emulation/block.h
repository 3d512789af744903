#pragma once

// The inside of the SIMT core: threads, warps, blocks and their grid. Everything here belongs to
// the one grid that steps; nothing of it is instrumented, because only .cu files are.

#include <array>
#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "tests/emulation/fiber.h"
#include "tests/emulation/shadow.h"
#include "tests/emulation/simt.h"

namespace simt {

// What every GPU of compute capability 8.0 or 9.0 has at most, per block.
inline constexpr std::size_t kMaxStaticShared = 48 << 10;
inline constexpr std::size_t kMaxDynamicShared = 227 << 10;
// Behind each static object, so that a write past its end hits no other.
inline constexpr std::size_t kStaticGap = 64;

enum class State : std::uint8_t { kReady, kBarrier, kCollective, kDependency, kSpin, kExited };
enum class Collective : std::uint8_t { kSyncWarp, kShuffle, kVote, kMma, kLdmatrix };
[[nodiscard]] const char* name_of(Collective kind);

struct Block;
struct GridState;

/// One thread of a kernel.
struct Fiber {
  Context context;
  Block* block = nullptr;
  uint3 index = {};
  int linear = 0, lane = 0, warp = 0;
  State state = State::kReady;
  /// The last place where it met others, for reports.
  Site site;
  Collective waiting_in = Collective::kSyncWarp;
  /// The newest __syncwarp it took part in: equal for two lanes if none has come between.
  std::uint32_t warp_epoch = 0;
  /// Serial of its newest fence, 0 for none.
  std::uint32_t fenced = 0;
};

/// Lanes that wait for each other: equal mask, kind and place.
struct Rendezvous {
  unsigned mask = 0;
  unsigned arrived = 0;
  Collective kind = Collective::kSyncWarp;
  Site site;
};

/// Bit i of a mask is lane i.
struct Warp {
  unsigned ready = 0, spinning = 0, waiting_dependency = 0, at_barrier = 0;
  /// Also the lanes that the block never had.
  unsigned exited = 0;
  std::vector<Rendezvous> meetings;
  std::array<void*, 32> payloads = {};
  std::uint32_t newest_epoch = 0;
};

struct PendingCopy {
  void* to;
  const void* from;
  int from_bytes;
  int group;
  Site site;
};

/// A thread's cp.async: kept by the block, which outlives threads that are dropped.
struct CopyQueue {
  std::vector<PendingCopy> pending;
  int committed_groups = 0;
};

struct StaticObject {
  const void* key;
  const char* name;
  std::size_t offset, bytes;
};

/// Shared memory of a block: two ranges between guard pages. Dynamic memory ends at its guard, to
/// within the 16 bytes of its alignment.
struct Arena {
  char* static_base = nullptr;
  char* dynamic_end = nullptr;
  /// Of the static objects, and of the launch's dynamic bytes; null where nothing is checked.
  SharedShadow static_shadow, dynamic_shadow;
};

struct Block {
  GridState* grid = nullptr;
  int id = 0;
  uint3 index = {};
  std::vector<Fiber> fibers;
  std::vector<Warp> warps;
  int live = 0;

  int at_barrier = 0;
  const Fiber* first_at_barrier = nullptr;
  Reduction reduction = Reduction::kNone;
  int reduced = 0, reduction_result = 0;
  /// Of its newest barrier; no two blocks of the process share one.
  std::uint32_t barrier_epoch = 0;

  Arena arena;
  std::size_t static_bytes = 0;  // with gaps
  std::size_t static_payload = 0;
  std::vector<StaticObject> objects;
  std::vector<CopyQueue> copies;

  /// What this block knows of the others' writes: block -> serial (shadow.h).
  std::map<int, std::uint32_t> known;
  std::uint32_t newest_fence = 0;
};

struct GridState {
  const char* name = "";
  dim3 grid, block;
  std::size_t shared_bytes = 0;
  void (*body)(const void*) = nullptr;
  std::shared_ptr<const void> args;
  std::size_t arg_bytes = 0;
  int device = 0;

  bool dependency_done = true;
  bool failed = false;
  std::string error;

  std::vector<int> order;  // block ids, as they start
  std::size_t next = 0;
  std::vector<std::unique_ptr<Block>> live;
  std::mt19937_64 random;
  Block* favourite_block = nullptr;
  int favourite_warp = -1;

  /// Of memory, by atomics and releases: whether threads that spin have done something.
  std::uint64_t changes = 0;

  /// Of this launch in the process, and a clock of its accesses, for the checks.
  std::uint16_t epoch = 0;
  std::uint32_t serial = 0;
  std::map<const void*, std::map<int, std::uint32_t>> published;
};

/// The thread of a kernel that runs now; null in host code.
extern Fiber* current;

/// Starts block `id`: threads ready, shared memory poison.
[[nodiscard]] std::unique_ptr<Block> make_block(GridState& grid, int id);
/// Gives stacks and shared memory back; the block may be in any state.
void drop(Block& block);

[[nodiscard]] std::uint32_t next_barrier_epoch();
/// What the launch asked for, to the alignment of its base.
[[nodiscard]] inline std::size_t dynamic_bytes(const Block& block) {
  return (block.grid->shared_bytes + 15) / 16 * 16;
}

/// Stops the running thread until somebody sets its ready bit.
void park(State state, Site site);
/// What `__syncthreads` waits for has all arrived.
void release_barrier(Block& block);
/// After the last statement of a thread: whoever waits for it goes on, or is reported.
void leave_block(Fiber& fiber);

/// Runs `exec` once, on the last lane to come, with the lanes' payloads.
using Exec = void (*)(void* const* payloads, unsigned mask);
void meet(Collective kind, unsigned mask, void* payload, Exec exec, Site site);

void set_error(std::string what, Site site);
[[noreturn]] void leave_failed_grid();
/// Ends the grid with the text that `describe` makes; only from a kernel's thread. The thread is
/// dropped where it stands, destructors and all, so what the text is made of must live in there.
template <class Describe>
[[noreturn]] void fail(Site site, Describe&& describe) {
  set_error(std::forward<Describe>(describe)(), site);
  leave_failed_grid();
}
/// Without a place: the report names the last one that the thread passed.
template <class Describe>
[[noreturn]] void fail(Describe&& describe) {
  fail(Site{}, std::forward<Describe>(describe));
}
/// "kernel block (0,0,0) thread 5".
[[nodiscard]] std::string name_of(const Fiber& fiber);
[[nodiscard]] std::string to_string(Site site);
/// Who waits where, when nothing can run.
[[nodiscard]] std::string describe_deadlock(const Block& block);
/// An address as a kernel's report names it: shared memory, the thread's stack, or a region.
[[nodiscard]] std::string describe_for_kernel(const void* address);

[[nodiscard]] bool is_shared(const Block& block, const void* address);

}  // namespace simt
