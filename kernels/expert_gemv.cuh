#pragma once

#include <cstdint>

#include "kernels/active_experts.cuh"
#include "kernels/expert_gemv.h"
#include "kernels/expert_matrix.cuh"
#include "kernels/matrix_launch.cuh"

// The body of the decode pair: which tiles a block takes, the way of weights and activations and
// what becomes of the sums. How it multiplies is `Sums`: expert_gemv_{mma,fma}_cuda.cu, which
// instantiate `launch_gemv`.

namespace sluice::device {

inline constexpr int kGemvThreads = kGemvWarps * 32;
inline constexpr int kTile = 16;  // rows
inline constexpr int kDepth = kGemvDepth;
/// One warp's sums of a tile: [token][row], padded so that a warp's stores hit different banks.
inline constexpr int kPartialPitch = 20;

template <class List>
struct GemvParams {
  List list;
  RoutedRows routed;
  ExpertMatrix matrix;
  const void* input = nullptr;
  // ExpertGemvPlan's.
  std::int32_t warps_per_tile = 1;
  std::int32_t num_tiles = 0;
  std::int32_t tiles_per_item = 1;
  std::int32_t items_per_expert = 0;
  std::int32_t whole_tokens = 0;
  std::int32_t whole_pitch = 0;
  std::int32_t segment_columns = 0;
  std::int32_t segment_pitch = 0;
  std::int32_t stage_bytes = 0;
};

/// The rows g and g + 8 of a lane's tile, at the columns that are the lane's; null: no such row.
template <class W>
struct TileRows {
  const W* a = nullptr;
  const W* b = nullptr;
};

/// A warp's weights on their way: `kDepth` steps of both rows, each loaded again as soon as it is
/// used, so that as many bytes stay in flight to the end of the row.
template <class W>
struct WeightQueue {
  static constexpr int kLaneColumns = kPerLoad<W>;
  static constexpr int kStepColumns = 4 * kLaneColumns;
  static constexpr int kBlockColumns = kDepth * kStepColumns;
  uint4 a[kDepth];
  uint4 b[kDepth];

  /// `column` is the first of the step; past the row's end, or without a row, zeros.
  __device__ __forceinline__ void load(int step, const TileRows<W>& rows, int column, int columns,
                                       int lane) {
    const bool inside = column + kLaneColumns * (lane % 4) < columns;
    a[step] = inside && rows.a != nullptr ? ptx::load_stream(rows.a + column) : uint4{0, 0, 0, 0};
    b[step] = inside && rows.b != nullptr ? ptx::load_stream(rows.b + column) : uint4{0, 0, 0, 0};
  }
  __device__ __forceinline__ void prime(const TileRows<W>& rows, int first, int columns, int lane) {
#pragma unroll
    for (int step = 0; step < kDepth; ++step) {
      load(step, rows, first + step * kStepColumns, columns, lane);
    }
  }
};

/// One item of a block: `tiles_per_item` tiles of one busy expert.
struct GemvItem {
  const ExpertWeights* expert = nullptr;
  int active = -1;
  int first_tile = 0;
  std::int32_t first_row = 0;  // routed position
  int tokens = 0;
};

/// Copies columns [begin, begin + count) of the expert's input rows to shared memory, with zeros up
/// to a whole step. Ends with a barrier.
template <class A, int kStepColumns>
__device__ __forceinline__ void stage(const ExpertMatrix& matrix, const RoutedRows& routed,
                                      const void* input, const GemvItem& item, int begin, int count,
                                      int pitch, A* to) {
  constexpr int kChunk = kPerLoad<A>;
  const int chunks = (count + kStepColumns - 1) / kStepColumns * (kStepColumns / kChunk);
  for (int i = static_cast<int>(threadIdx.x); i < item.tokens * chunks; i += kGemvThreads) {
    const int token = i / chunks;
    const int column = (i - token * chunks) * kChunk;
    const A* const row = input_row<A>(matrix, routed, input, item.first_row + token) + begin;
    const bool inside = column < count;  // widths are multiples of 8: a chunk is in or out
    ptx::cp_async16(to + token * pitch + column, row + (inside ? column : 0), inside ? 16 : 0);
  }
  ptx::cp_async_commit();
  ptx::cp_async_wait<0>();
  __syncthreads();
}

// One expert's matrix times its few tokens, 16 rows of 16 tokens at a time; weights are read once.
//
// Mapping:  persistent blocks; item = (busy expert, 8 / warps_per_tile neighbouring tiles), static
//           round-robin. Lane 4g + t of a warp loads 16 bytes of rows g and g + 8 per step, 4 steps
//           ahead; paired matrices: row g is a gate row and g + 8 its up row.
// Traffic:  the weights once from DRAM, 16 bytes per lane and load (64 KiB in flight per SM, of
//           which ~25 are needed), the activations once per item from L2; DRAM-bound.
// Numerics: see expert_gemv.h.
// Requires: C % 8 == 0, rows 16-byte aligned; the plan's shared memory.
// Source:   tokens as the mma's 8 columns: Marlin (Frantar et al. 2024); here without a repack.
template <class Sums, bool kPaired, class List>
__global__ void __launch_bounds__(kGemvThreads, 2)
    expert_gemv_kernel(const __grid_constant__ GemvParams<List> p) {
  using W = typename Sums::Weight;
  using A = typename Sums::Activation;
  using Queue = WeightQueue<W>;
  SLUICE_DYNAMIC_SHARED(memory);
  // Two, used in turns: a warp may write the next item's sums while others still read this one's.
  SLUICE_SHARED(float, partials, [2][kGemvWarps][kGemvTokens * kPartialPitch]);
  A* const staged = reinterpret_cast<A*>(memory);
  int* const at = reinterpret_cast<int*>(memory + p.stage_bytes);
  int* const first_item = at + p.list.count;

  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int warp = static_cast<int>(threadIdx.x) / 32;
  const int part = warp % p.warps_per_tile;   // of the columns
  const int place = warp / p.warps_per_tile;  // of the tile within its item
  const int columns = p.matrix.columns;
  const int first_column = part * Queue::kBlockColumns;
  const int stride = p.warps_per_tile * Queue::kBlockColumns;

  // What gate_up reads may be the previous kernel's work. Having waited it lets down start, whose
  // early part then finds list and offsets written: they lie ahead of gate_up. Plain loads only
  // from here on where a kernel writes: a pointer that promised otherwise (__restrict__) would let
  // loads move above the wait.
  if (!p.matrix.is_w2) {
    ptx::grid_dependency_wait();
    ptx::grid_launch_dependents();
  }
  const ActiveExperts experts = find_active<kGemvThreads>(
      p.list, p.routed, at, first_item,
      [&](int tokens) { return tokens >= 1 && tokens <= kGemvTokens ? p.items_per_expert : 0; });

  ItemCursor cursor;
  const auto open = [&](int number) {
    GemvItem item;
    item.first_tile = cursor.seek(experts, number) * p.tiles_per_item;
    item.active = cursor.active;
    const int entry = experts.at[cursor.active];
    const int expert = expert_at(p.list, entry);
    item.expert = &weights_at(p.list, entry);
    item.first_row = p.routed.offsets[expert];
    item.tokens = p.routed.offsets[expert + 1] - item.first_row;
    return item;
  };
  const auto rows_of = [&](const GemvItem& item) {
    TileRows<W> rows;
    const int tile = item.first_tile + place;
    if (tile >= p.num_tiles) return rows;
    const W* const lane_columns = static_cast<const W*>(weights_of(p.matrix, *item.expert)) +
                                  Queue::kLaneColumns * (lane % 4);
    const int g = lane / 4;
    if constexpr (kPaired) {
      const int channel = tile * (kTile / 2) + g;
      rows.a = lane_columns + paired_row(p.matrix, channel, 0) * columns;
      rows.b = lane_columns + paired_row(p.matrix, channel, 1) * columns;
    } else {
      const int row = tile * kTile + g;  // C % 8 == 0 everywhere: a tile has 8 rows or 16
      rows.a = lane_columns + static_cast<std::int64_t>(row) * columns;
      if (row + 8 < p.matrix.channels) rows.b = rows.a + std::int64_t{8} * columns;
    }
    return rows;
  };

  const int num_items = experts.num_items();
  int number = static_cast<int>(blockIdx.x);
  GemvItem item;
  TileRows<W> rows;
  Queue queue;
  if (number < num_items) {
    item = open(number);
    rows = rows_of(item);
    queue.prime(rows, first_column, columns, lane);
  }
  if (p.matrix.is_w2) {
    ptx::grid_dependency_wait();  // the first weights are on their way, h is not theirs
    ptx::grid_launch_dependents();
  }

  int staged_expert = -1;
  for (int turn = 0; number < num_items; ++turn) {
    const bool whole = item.tokens <= p.whole_tokens;
    const int pitch = whole ? p.whole_pitch : p.segment_pitch;
    const int segment_columns = whole ? columns : p.segment_columns;
    Sums sums;
    for (int begin = 0; begin < columns; begin += segment_columns) {
      const int end = begin + segment_columns < columns ? begin + segment_columns : columns;
      if (!whole || staged_expert != item.active) {
        if (begin > 0) __syncthreads();  // else the last item's barrier has ended all reading
        stage<A, Queue::kStepColumns>(p.matrix, p.routed, p.input, item, begin, end - begin, pitch,
                                      staged);
        staged_expert = item.active;
      }
      // Segments are whole strides, so this warp's blocks never straddle two.
      for (int block = begin + first_column; block < end; block += stride) {
#pragma unroll
        for (int step = 0; step < kDepth; ++step) {
          const int column = block + step * Queue::kStepColumns;
          if (column < end) {
            sums.add(queue.a[step], queue.b[step], staged + (column - begin), pitch, item.tokens,
                     lane);
          }
          queue.load(step, rows, column + stride, columns, lane);
        }
      }
    }
    sums.store(partials[turn % 2][warp], item.tokens, lane);

    const GemvItem done = item;
    number += static_cast<int>(gridDim.x);
    if (number < num_items) {
      item = open(number);
      rows = rows_of(item);
      queue.prime(rows, first_column, columns, lane);
    }
    __syncthreads();

    const int tile = done.first_tile + place;
    const int threads = 32 * p.warps_per_tile;
    if (tile < p.num_tiles) {
      const float* const bias = bias_of(p.matrix, *done.expert);
      const float* const first_warp = partials[turn % 2][place * p.warps_per_tile];
      for (int pair = 32 * part + lane; pair < 8 * done.tokens; pair += threads) {
        const int token = pair / 8;
        const int g = pair % 8;
        const float* sum = first_warp + token * kPartialPitch + g;
        float a = sum[0];
        float b = sum[8];
        for (int w = 1; w < p.warps_per_tile; ++w) {
          sum += kGemvTokens * kPartialPitch;
          a += sum[0];
          b += sum[8];
        }
        const std::int32_t position = done.first_row + token;
        if constexpr (kPaired) {
          finish_pair<A>(p.matrix, bias, position, tile * (kTile / 2) + g, a, b);
        } else {
          finish_row<A>(p.matrix, p.routed, bias, position, tile * kTile + g, a);
          finish_row<A>(p.matrix, p.routed, bias, position, tile * kTile + g + 8, b);
        }
      }
    }
  }
}

/// By either arithmetic, any list.
template <class Sums, class List>
void launch_gemv(const ExpertGemvPlan& plan, const MatrixLaunch<List>& matrix) {
  const GemvParams<List> params{.list = matrix.list,
                                .routed = matrix.routed,
                                .matrix = matrix.matrix,
                                .input = matrix.input,
                                .warps_per_tile = plan.warps_per_tile,
                                .num_tiles = plan.num_tiles,
                                .tiles_per_item = plan.tiles_per_item,
                                .items_per_expert = plan.items_per_expert,
                                .whole_tokens = plan.whole_tokens,
                                .whole_pitch = plan.whole_pitch,
                                .segment_columns = plan.segment_columns,
                                .segment_pitch = plan.segment_pitch,
                                .stage_bytes = static_cast<std::int32_t>(plan.stage_bytes)};
  launch_matrix(matrix, plan.blocks, kGemvThreads, plan.shared_bytes, params,
                expert_gemv_kernel<Sums, true, List>, expert_gemv_kernel<Sums, false, List>);
}

/// By kind of arithmetic; each in a .cu of its own.
template <class List>
void launch_gemv_mma(DType dtype, const ExpertGemvPlan& plan, const MatrixLaunch<List>& matrix);
template <class List>
void launch_gemv_fma(DType weights, const ExpertGemvPlan& plan, const MatrixLaunch<List>& matrix);

}  // namespace sluice::device
