// Where threads wait for each other: barriers, warp collectives, spins, the previous grid.

#include <bit>
#include <cstring>

#include "tests/emulation/block.h"

namespace simt {
namespace {

bool same(Site a, Site b) {
  return a.line == b.line && (a.file == b.file || std::strcmp(a.file, b.file) == 0);
}

unsigned bit_of(const Fiber& fiber) { return 1u << fiber.lane; }

Warp& warp_of(const Fiber& fiber) {
  return fiber.block->warps[static_cast<std::size_t>(fiber.warp)];
}

}  // namespace

void park(State state, Site site) {
  Fiber& fiber = *current;
  fiber.state = state;
  if (site.line != 0) fiber.site = site;
  suspend(fiber.context, false);
}

// ---- __syncthreads ----

void release_barrier(Block& block) {
  ++counters().barriers;
  block.barrier_epoch = next_barrier_epoch();
  block.at_barrier = 0;
  block.first_at_barrier = nullptr;
  block.reduction_result = block.reduced;
  for (Warp& warp : block.warps) {
    warp.ready |= warp.at_barrier;
    warp.at_barrier = 0;
  }
}

int barrier(Reduction reduction, int value, Site site) {
  Fiber& fiber = *current;
  Block& block = *fiber.block;
  if (block.at_barrier == 0) {
    block.first_at_barrier = &fiber;
    block.reduction = reduction;
    block.reduced = reduction == Reduction::kAnd ? 1 : 0;
  } else if (!same(block.first_at_barrier->site, site) || block.reduction != reduction) {
    fail(site, [&] {
      return "barrier divergence: this thread is at " + to_string(site) + ", thread " +
             std::to_string(block.first_at_barrier->linear) + " waits at " +
             to_string(block.first_at_barrier->site) + "; all must reach the same __syncthreads";
    });
  }
  switch (reduction) {
    case Reduction::kNone:
      break;
    case Reduction::kCount:
      block.reduced += value != 0 ? 1 : 0;
      break;
    case Reduction::kAnd:
      block.reduced &= value != 0 ? 1 : 0;
      break;
    case Reduction::kOr:
      block.reduced |= value != 0 ? 1 : 0;
      break;
  }
  fiber.site = site;
  warp_of(fiber).at_barrier |= bit_of(fiber);
  if (++block.at_barrier == block.live) release_barrier(block);
  park(State::kBarrier, site);
  // The next barrier cannot overwrite it: this thread has to reach that one first.
  return block.reduction_result;
}

void leave_block(Fiber& fiber) {
  Block& block = *fiber.block;
  Warp& warp = warp_of(fiber);
  if (!block.copies[static_cast<std::size_t>(fiber.linear)].pending.empty()) {
    const Site site = block.copies[static_cast<std::size_t>(fiber.linear)].pending.front().site;
    fail(site, [&] {
      return std::string("the thread exits with cp.async in flight; wait for its group first");
    });
  }
  for (const Rendezvous& meeting : warp.meetings) {
    if ((meeting.mask & bit_of(fiber)) != 0) {
      fail(meeting.site, [&] {
        return "warp divergence: lane " + std::to_string(fiber.lane) + " exits while lane " +
               std::to_string(std::countr_zero(meeting.arrived)) + " waits for it in " +
               name_of(meeting.kind);
      });
    }
  }
  warp.exited |= bit_of(fiber);
  // A thread that has exited is no longer waited for (CUDA: bar.sync counts the threads that live).
  if (--block.live > 0 && block.at_barrier == block.live) release_barrier(block);
}

// ---- warp collectives ----

void meet(Collective kind, unsigned mask, void* payload, Exec exec, Site site) {
  Fiber& fiber = *current;
  Warp& warp = warp_of(fiber);
  const unsigned bit = bit_of(fiber);
  if ((mask & bit) == 0) {
    fail(site, [&] {
      return std::string(name_of(kind)) + ": lane " + std::to_string(fiber.lane) +
             " is not in the mask that it gives";
    });
  }
  if (const unsigned gone = mask & warp.exited; gone != 0) {
    fail(site, [&] {
      return std::string(name_of(kind)) + ": the mask names lane " +
             std::to_string(std::countr_zero(gone)) + ", which has exited";
    });
  }
  Rendezvous* meeting = nullptr;
  for (Rendezvous& other : warp.meetings) {
    if ((other.mask & mask) == 0) continue;
    if (other.mask != mask || other.kind != kind || !same(other.site, site)) {
      fail(site, [&] {
        return std::string("warp divergence: this lane is in ") + name_of(kind) + " at " +
               to_string(site) + ", lane " + std::to_string(std::countr_zero(other.arrived)) +
               " waits in " + name_of(other.kind) + " at " + to_string(other.site) +
               (other.mask != mask ? " with another mask" : "");
      });
    }
    meeting = &other;
  }
  if (meeting == nullptr) {
    meeting = &warp.meetings.emplace_back(
        Rendezvous{.mask = mask, .arrived = 0, .kind = kind, .site = site});
  }
  warp.payloads[static_cast<std::size_t>(fiber.lane)] = payload;
  fiber.waiting_in = kind;
  fiber.site = site;
  meeting->arrived |= bit;
  if (meeting->arrived == mask) {
    *meeting = warp.meetings.back();
    warp.meetings.pop_back();
    ++counters().collectives;
    exec(warp.payloads.data(), mask);
    warp.ready |= mask;
  }
  park(State::kCollective, site);
}

void sync_warp(unsigned mask, Site site) {
  meet(
      Collective::kSyncWarp, mask, current,
      [](void* const* lanes, unsigned members) {
        // A number of its own: lanes compare equal only if both last synchronised here.
        std::uint32_t epoch = 0;
        for (unsigned rest = members; rest != 0; rest &= rest - 1) {
          Fiber& lane = *static_cast<Fiber*>(lanes[std::countr_zero(rest)]);
          if (epoch == 0) epoch = ++warp_of(lane).newest_epoch;
          lane.warp_epoch = epoch;
        }
      },
      site);
}

// ---- waiting for others ----

void spin() {
  warp_of(*current).spinning |= bit_of(*current);
  park(State::kSpin, {});
}

void grid_dependency_wait(Site site) {
  if (current->block->grid->dependency_done) return;
  warp_of(*current).waiting_dependency |= bit_of(*current);
  park(State::kDependency, site);
}

}  // namespace simt
