#pragma once

#include <cstdint>

#include "kernels/expert_list.h"
#include "kernels/ptx.h"

// Which experts of a list a launch works on, found by every block for itself: no host decision, and
// blocks of a persistent grid then take items of busy experts only.

namespace sluice::device {

__device__ __forceinline__ const ExpertWeights& weights_at(const ExpertEntries& list, int at) {
  return list.entries[at].weights;
}
__device__ __forceinline__ const ExpertWeights& weights_at(const ExpertTable& list, int at) {
  return list.experts[at];
}
__device__ __forceinline__ int expert_at(const ExpertEntries& list, int at) {
  return list.entries[at].expert;
}
__device__ __forceinline__ int expert_at(const ExpertTable& /*list*/, int at) { return at; }

/// In shared memory; entry i of `at` and `first_item` belongs to the i-th busy expert in list
/// order.
struct ActiveExperts {
  int* at = nullptr;          // [n] place in the list
  int* first_item = nullptr;  // [n + 1] items of the busy experts ahead; the last: of all
  int count = 0;
  [[nodiscard]] __device__ __forceinline__ int num_items() const { return first_item[count]; }
};

/// Fills `at` [list.count] and `first_item` [list.count + 1]. `items_of(tokens)` is the number of
/// items of an expert with so many rows; 0: the launch leaves it alone.
///
/// All kThreads threads of the block call it; its barriers also publish the result.
template <int kThreads, class List, class ItemsOf>
__device__ __forceinline__ ActiveExperts find_active(const List& list, const RoutedRows& routed,
                                                     int* at, int* first_item, ItemsOf items_of) {
  constexpr int kWarps = kThreads / 32;
  constexpr unsigned kAll = 0xffffffffu;
  SLUICE_SHARED(int, warp_busy, [kWarps]);
  SLUICE_SHARED(int, warp_items, [kWarps]);
  const int thread = static_cast<int>(threadIdx.x);
  const int warp = thread / 32;
  const int lane = thread % 32;

  int busy_ahead = 0;
  int items_ahead = 0;
  for (int round = 0; round < list.count; round += kThreads) {
    const int entry = round + thread;
    int items = 0;
    if (entry < list.count) {
      const int expert = expert_at(list, entry);
      const int tokens = routed.offsets[expert + 1] - routed.offsets[expert];
      // The table is read only where there are tokens: most of its experts have none.
      items = items_of(tokens);
      if (items > 0 && weights_at(list, entry).w13 == nullptr) items = 0;
    }
    const unsigned busy = __ballot_sync(kAll, items > 0);
    int sum = items;  // of this lane and those below
#pragma unroll
    for (int step = 1; step < 32; step *= 2) {
      const int below = __shfl_up_sync(kAll, sum, step);
      if (lane >= step) sum += below;
    }
    if (lane == 31) {
      warp_busy[warp] = __popc(busy);
      warp_items[warp] = sum;
    }
    __syncthreads();
    int place = busy_ahead + __popc(busy & ((1u << lane) - 1));
    int first = items_ahead + sum - items;
    for (int w = 0; w < kWarps; ++w) {
      if (w < warp) {
        place += warp_busy[w];
        first += warp_items[w];
      }
      busy_ahead += warp_busy[w];
      items_ahead += warp_items[w];
    }
    if (items > 0) {
      at[place] = entry;
      first_item[place] = first;
    }
    __syncthreads();  // the next round writes the warps' sums again
  }
  if (thread == 0) first_item[busy_ahead] = items_ahead;
  __syncthreads();
  return {at, first_item, busy_ahead};
}

/// A thread's way through the items in ascending order.
struct ItemCursor {
  int active = 0;  // index of the busy expert that holds the item

  /// Moves to `item`, which is not below the last one, and returns its number within its expert.
  __device__ __forceinline__ int seek(const ActiveExperts& experts, int item) {
    while (item >= experts.first_item[active + 1]) ++active;
    return item - experts.first_item[active];
  }
};

}  // namespace sluice::device
