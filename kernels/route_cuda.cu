#include <string>

#include "kernels/elements.cuh"
#include "kernels/launch.h"
#include "kernels/launch_check.h"
#include "kernels/route.h"

namespace sluice {
namespace {

constexpr int kKeys = kRouteExpertsPerPass;
constexpr int kMostWarps = 32;
constexpr unsigned kAll = 0xffffffffu;

struct RouteParams {
  RouteArgs args;
  std::int64_t num_entries = 0;
  std::int32_t num_experts = 0;
  std::int32_t entries_per_warp = 0;
  std::int32_t key_bits = 1;
};

/// One entry of a warp's turn. `peers`: the lanes whose entries go to the same expert.
struct Turn {
  bool taken = false;  // by an expert of this pass
  int key = 0;         // the expert, from the pass's first
  unsigned peers = 0;
};

template <class Weight>
__device__ __forceinline__ Turn read_turn(const RouteParams& p, std::int64_t entry, int first) {
  Turn turn;
  if (entry < p.num_entries) {
    const std::int64_t id = p.args.ids[entry];
    turn.taken = id >= first && id < p.num_experts && id < first + kKeys &&
                 device::is_nonzero(static_cast<const Weight*>(p.args.weights)[entry]);
    if (turn.taken) turn.key = static_cast<int>(id) - first;
  }
  turn.peers = __ballot_sync(kAll, turn.taken);
  if (turn.peers == 0) return turn;  // the whole warp's
  for (int bit = 0; bit < p.key_bits; ++bit) {
    const bool set = (turn.key >> bit & 1) != 0;
    const unsigned with = __ballot_sync(kAll, set);
    turn.peers &= set ? with : ~with;
  }
  return turn;
}

// A counting sort by expert that keeps the order of entries, in one block.
//
// Mapping:  warp w owns a contiguous run of entries and a row of counters, one per expert of the
//           pass; a turn takes 32 entries. Count; sum the counters over experts and, within one,
//           over warps; then each counter is the place of its warp's next entry.
// Traffic:  12 to 20 bytes per entry, twice per pass of 256 experts; latency-bound.
// Numerics: none; no atomics, so the order is the entries'.
// Requires: nothing of alignment; E + T · K < 2^31.
template <class Weight>
__global__ void __launch_bounds__(32 * kMostWarps)
    route_kernel(const __grid_constant__ RouteParams p) {
  SLUICE_SHARED(int, counters, [kMostWarps][kKeys]);
  SLUICE_SHARED(int, totals, [kKeys]);
  SLUICE_SHARED(int, pass_total, [1]);
  const int thread = static_cast<int>(threadIdx.x);
  const int num_threads = static_cast<int>(blockDim.x);
  const int num_warps = num_threads / 32;
  const int warp = thread / 32;
  const int lane = thread % 32;
  const unsigned below = (1u << lane) - 1;
  const std::int64_t begin = static_cast<std::int64_t>(warp) * p.entries_per_warp;
  const std::int64_t end =
      begin + p.entries_per_warp < p.num_entries ? begin + p.entries_per_warp : p.num_entries;
  int* const own = counters[warp];

  ptx::grid_dependency_wait();
  ptx::grid_launch_dependents();
  int placed = 0;  // rows of the passes before
  for (int first = 0; first < p.num_experts; first += kKeys) {
    for (int key = lane; key < kKeys; key += 32) own[key] = 0;
    __syncwarp();
    for (std::int64_t at = begin; at < end; at += 32) {
      const Turn turn = read_turn<Weight>(p, at + lane, first);
      if (turn.taken && (turn.peers & below) == 0) own[turn.key] += __popc(turn.peers);
      __syncwarp();
    }
    __syncthreads();

    for (int key = thread; key < kKeys; key += num_threads) {
      int total = 0;
      for (int w = 0; w < num_warps; ++w) total += counters[w][key];
      totals[key] = total;
    }
    __syncthreads();
    if (warp == 0) {  // exclusive sums, eight neighbouring experts per lane
      constexpr int kPerLane = kKeys / 32;
      int sum = 0;
      for (int i = 0; i < kPerLane; ++i) sum += totals[lane * kPerLane + i];
      int up_to = sum;
#pragma unroll
      for (int step = 1; step < 32; step *= 2) {
        const int other = __shfl_up_sync(kAll, up_to, step);
        if (lane >= step) up_to += other;
      }
      int start = placed + up_to - sum;
      for (int i = 0; i < kPerLane; ++i) {
        const int count = totals[lane * kPerLane + i];
        totals[lane * kPerLane + i] = start;
        start += count;
      }
      if (lane == 31) pass_total[0] = start;
    }
    __syncthreads();
    for (int key = thread; key < kKeys; key += num_threads) {
      int next = totals[key];
      if (first + key < p.num_experts) p.args.offsets[first + key] = next;
      for (int w = 0; w < num_warps; ++w) {
        const int count = counters[w][key];
        counters[w][key] = next;
        next += count;
      }
    }
    placed = pass_total[0];
    __syncthreads();

    for (std::int64_t at = begin; at < end; at += 32) {
      const Turn turn = read_turn<Weight>(p, at + lane, first);
      const int next = turn.taken ? own[turn.key] : 0;
      __syncwarp();
      if (turn.taken) {
        p.args.rows[next + __popc(turn.peers & below)] = static_cast<std::int32_t>(at + lane);
        if ((turn.peers & below) == 0) own[turn.key] = next + __popc(turn.peers);
      }
      __syncwarp();
    }
  }
  if (thread == 0) p.args.offsets[p.num_experts] = placed;
}

}  // namespace

void launch_route(const RouteProblem& problem, const RoutePlan& plan, const RouteArgs& args,
                  StreamHandle stream, bool overlap_previous) {
  const RouteParams params{.args = args,
                           .num_entries = problem.num_tokens * problem.top_k,
                           .num_experts = problem.num_experts,
                           .entries_per_warp = plan.entries_per_warp,
                           .key_bits = plan.key_bits};
  require<InternalError>(
      static_cast<std::int64_t>(plan.warps) * plan.entries_per_warp >= params.num_entries, [&] {
        return "route: got a plan for " + std::to_string(plan.warps * plan.entries_per_warp) +
               " entries, expected one for " + std::to_string(params.num_entries);
      });
  const LaunchShape shape{.grid = dim3(1),
                          .block = dim3(static_cast<unsigned>(32 * plan.warps)),
                          .stream = to_cuda(stream),
                          .overlap_previous = overlap_previous};
  dispatch_dtype(problem.weights, [&](auto tag) {
    using Weight = typename decltype(tag)::type;
    check_launch("route", launch("route", shape, route_kernel<Weight>, params));
  });
}

}  // namespace sluice
