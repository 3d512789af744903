// A launch: blocks in batches, threads in one of four orders.

#include <algorithm>
#include <bit>
#include <numeric>
#include <tuple>
#include <utility>

#include "tests/emulation/block.h"
#include "tests/emulation/faults.h"

namespace simt {

// The objects behind the constants of intrinsics.h: for a running thread they are constant, and
// nothing that outlives a switch reads them.
uint3 running_thread_index __asm__("threadIdx");
uint3 running_block_index __asm__("blockIdx");
Extent running_block_dim __asm__("blockDim");
Extent running_grid_dim __asm__("gridDim");

Fiber* current = nullptr;

Options& options() {
  static Options instance;
  return instance;
}

Counters& counters() {
  static Counters instance;
  return instance;
}

namespace {

Extent extent(dim3 dim) { return {dim.x, dim.y, dim.z}; }

enum class Outcome { kProgress, kIdle, kFailed };

Outcome run(Fiber& fiber) {
  ++counters().switches;
  const Block& block = *fiber.block;
  running_thread_index = fiber.index;
  running_block_index = block.index;
  const bool was_spinning = fiber.state == State::kSpin;
  const std::uint64_t changes = block.grid->changes;
  fiber.state = State::kReady;
  current = &fiber;
  resume(fiber.context);
  current = nullptr;
  if (block.grid->failed) return Outcome::kFailed;
  const bool idle = was_spinning && fiber.state == State::kSpin && block.grid->changes == changes;
  return idle ? Outcome::kIdle : Outcome::kProgress;
}

/// One pass over the threads that are ready. Keeps whether any of them did something.
class Round {
 public:
  explicit Round(GridState& grid) : grid_(grid) {}

  void run_all() {
    switch (options().order) {
      case Order::kForward:
        return run_forward();
      case Order::kReverse:
        return run_reverse();
      case Order::kRandom:
        return run_random();
      case Order::kSkew:
        return run_skew();
    }
  }

  [[nodiscard]] bool ran() const { return ran_; }
  [[nodiscard]] bool progress() const { return progress_; }

 private:
  // False once the grid has failed.
  bool run_lane(Fiber& fiber) {
    ran_ = true;
    const Outcome outcome = run(fiber);
    progress_ = progress_ || outcome == Outcome::kProgress;
    return outcome != Outcome::kFailed;
  }

  static Fiber& lane_of(Block& block, std::size_t warp, int lane) {
    return block.fibers[warp * 32 + static_cast<std::size_t>(lane)];
  }

  void run_forward() {
    for (const auto& block : grid_.live) {
      for (std::size_t w = 0; w < block->warps.size(); ++w) {
        unsigned lanes = std::exchange(block->warps[w].ready, 0);
        for (; lanes != 0; lanes &= lanes - 1) {
          if (!run_lane(lane_of(*block, w, std::countr_zero(lanes)))) return;
        }
      }
    }
  }

  void run_reverse() {
    for (const auto& block : grid_.live) {  // they have started in descending order
      for (std::size_t w = block->warps.size(); w-- > 0;) {
        unsigned lanes = std::exchange(block->warps[w].ready, 0);
        while (lanes != 0) {
          const int lane = 31 - std::countl_zero(lanes);
          lanes &= ~(1u << lane);
          if (!run_lane(lane_of(*block, w, lane))) return;
        }
      }
    }
  }

  void run_random() {
    std::vector<Fiber*> ready;
    for (const auto& block : grid_.live) {
      for (std::size_t w = 0; w < block->warps.size(); ++w) {
        unsigned lanes = std::exchange(block->warps[w].ready, 0);
        for (; lanes != 0; lanes &= lanes - 1) {
          ready.push_back(&lane_of(*block, w, std::countr_zero(lanes)));
        }
      }
    }
    std::shuffle(ready.begin(), ready.end(), grid_.random);
    for (Fiber* fiber : ready) {
      if (!run_lane(*fiber)) return;
    }
  }

  void run_skew() {
    const auto favourite_ready = [this]() -> unsigned {
      if (grid_.favourite_block == nullptr) return 0;
      return grid_.favourite_block->warps[static_cast<std::size_t>(grid_.favourite_warp)].ready;
    };
    if (favourite_ready() == 0) choose_favourite();
    if (favourite_ready() == 0) return;
    Block& block = *grid_.favourite_block;
    const auto w = static_cast<std::size_t>(grid_.favourite_warp);
    unsigned lanes = std::exchange(block.warps[w].ready, 0);
    for (; lanes != 0; lanes &= lanes - 1) {
      if (!run_lane(lane_of(block, w, std::countr_zero(lanes)))) return;
    }
  }

  void choose_favourite() {
    std::vector<std::pair<Block*, int>> candidates;
    for (const auto& block : grid_.live) {
      for (std::size_t w = 0; w < block->warps.size(); ++w) {
        if (block->warps[w].ready != 0) candidates.emplace_back(block.get(), static_cast<int>(w));
      }
    }
    if (candidates.empty()) return;
    std::tie(grid_.favourite_block, grid_.favourite_warp) =
        candidates[grid_.random() % candidates.size()];
  }

  GridState& grid_;
  bool ran_ = false;
  bool progress_ = false;
};

void start_batch(GridState& grid) {
  const auto resident = static_cast<std::size_t>(std::max(options().resident, 1));
  while (grid.live.size() < resident && grid.next < grid.order.size()) {
    grid.live.push_back(make_block(grid, grid.order[grid.next++]));
  }
}

void end_blocks(GridState& grid) {
  std::erase_if(grid.live, [&](const std::unique_ptr<Block>& block) {
    if (block->live > 0) return false;
    if (grid.favourite_block == block.get()) grid.favourite_block = nullptr;
    drop(*block);
    return true;
  });
}

struct Waiting {
  bool ready = false, spinning = false, dependency = false;
};
Waiting survey(const GridState& grid) {
  Waiting waiting;
  for (const auto& block : grid.live) {
    for (const Warp& warp : block->warps) {
      waiting.ready = waiting.ready || warp.ready != 0;
      waiting.spinning = waiting.spinning || warp.spinning != 0;
      waiting.dependency = waiting.dependency || warp.waiting_dependency != 0;
    }
  }
  return waiting;
}

/// Once the dependency is done, those that wait for it go on.
void wake_dependents(GridState& grid) {
  for (const auto& block : grid.live) {
    for (Warp& warp : block->warps) warp.ready |= std::exchange(warp.waiting_dependency, 0);
  }
}

/// Spinning threads look again.
void wake_spinning(GridState& grid) {
  for (const auto& block : grid.live) {
    for (Warp& warp : block->warps) warp.ready |= std::exchange(warp.spinning, 0);
  }
}

std::string check_shape(const GridState& grid) {
  const auto threads = std::size_t{grid.block.x} * grid.block.y * grid.block.z;
  const auto blocks = std::size_t{grid.grid.x} * grid.grid.y * grid.grid.z;
  if (threads == 0 || threads > 1024) {
    return "launch: got " + std::to_string(threads) + " threads per block, expected 1 to 1024";
  }
  if (blocks == 0 || blocks >= std::size_t{1} << 31) {
    return "launch: got " + std::to_string(blocks) + " blocks, expected 1 to 2^31 - 1";
  }
  if (grid.shared_bytes > kMaxDynamicShared) {
    return "launch: got " + std::to_string(grid.shared_bytes) +
           " bytes of dynamic shared memory, expected at most " + std::to_string(kMaxDynamicShared);
  }
  return {};
}

void order_blocks(GridState& grid) {
  grid.order.resize(std::size_t{grid.grid.x} * grid.grid.y * grid.grid.z);
  std::iota(grid.order.begin(), grid.order.end(), 0);
  if (options().order == Order::kReverse) std::reverse(grid.order.begin(), grid.order.end());
  if (options().order == Order::kRandom) {
    std::shuffle(grid.order.begin(), grid.order.end(), grid.random);
  }
}

Grid::Step fail_grid(GridState& grid, std::string error) {
  grid.failed = true;
  if (!error.empty()) grid.error = std::string(grid.name) + ": " + error;
  for (const auto& block : grid.live) drop(*block);
  grid.live.clear();
  return Grid::Step::kFailed;
}

}  // namespace

Grid::Grid(const char* name, dim3 grid, dim3 block, std::size_t shared_bytes,
           void (*body)(const void* args), std::shared_ptr<const void> args, std::size_t arg_bytes)
    : state_(std::make_unique<GridState>()) {
  static std::uint16_t launches = 0;
  GridState& state = *state_;
  state.name = name;
  state.grid = grid;
  state.block = block;
  state.shared_bytes = shared_bytes;
  state.body = body;
  state.args = std::move(args);
  state.arg_bytes = arg_bytes;
  state.random.seed(options().seed);
  // Words of memory remember sixteen bits of it; 0 is nobody's.
  if (++launches == 0) {
    forget_accesses();
    ++launches;
  }
  state.epoch = launches;
}

Grid::~Grid() {
  for (const auto& block : state_->live) drop(*block);
}

void Grid::set_dependency_done(bool done) { state_->dependency_done = done; }
void Grid::set_device(int device) { state_->device = device; }
const std::string& Grid::error() const { return state_->error; }
const char* Grid::name() const { return state_->name; }

Grid::Step Grid::step() {
  GridState& grid = *state_;
  if (grid.failed) return Step::kFailed;
  if (grid.order.empty()) {
    if (std::string error = check_shape(grid); !error.empty()) {
      return fail_grid(grid, std::move(error));
    }
    order_blocks(grid);
  }
  running_block_dim = extent(grid.block);
  running_grid_dim = extent(grid.grid);
  const DeviceWork work;  // faults of this thread are the kernel's now
  if (grid.live.empty()) start_batch(grid);

  if (grid.dependency_done) wake_dependents(grid);
  bool progress = false;
  // Spinning threads look twice in vain before the step ends: in the first round one may have
  // looked before another answered it.
  for (int idle_rounds = 0; !grid.live.empty();) {
    // Under skew a warp that spins has gone as far as it can: the others come first.
    if (options().order != Order::kSkew || !survey(grid).ready) wake_spinning(grid);
    Round round(grid);
    round.run_all();
    if (grid.failed) return fail_grid(grid, {});
    end_blocks(grid);
    if (round.progress()) {
      progress = true;
      idle_rounds = 0;
      continue;
    }
    const Waiting waiting = survey(grid);
    if (waiting.ready || (round.ran() && ++idle_rounds < 2)) continue;
    if (waiting.dependency) return Step::kBlockedOnDependency;
    if (waiting.spinning) return progress ? Step::kProgress : Step::kSpinning;
    return fail_grid(grid, "nothing can run: " + describe_deadlock(*grid.live.front()));
  }
  return grid.next < grid.order.size() ? Step::kProgress : Step::kDone;
}

}  // namespace simt
