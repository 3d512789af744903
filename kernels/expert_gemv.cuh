#pragma once

#include <cstdint>

#include "kernels/active_experts.cuh"
#include "kernels/expert_gemv.h"
#include "kernels/expert_matrix.cuh"
#include "kernels/launch.h"
#include "kernels/launch_check.h"

// The body of the decode pair. Included by expert_gemv_{mma,fma}_cuda.cu, one per kind of
// arithmetic, which instantiate `launch_gemv` at their end.

namespace sluice::device {

inline constexpr int kGemvThreads = 256;
inline constexpr int kGemvWarps = kGemvThreads / 32;
inline constexpr int kTile = 16;  // rows
/// 16-byte loads of each of its two rows that a lane has in flight.
inline constexpr int kDepth = 4;
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

/// A lane's share of one warp's sums, on tensor cores: weights are the 16-row operand, tokens its 8
/// columns, twice. Lane 4g + t holds rows g, g + 8 of tokens 2t, 2t + 1.
template <class T>
struct MmaSums {
  ptx::Accumulators c[2] = {};

  /// Adds the lane's 8 columns of both rows. `x` is column 0 of this step in shared memory.
  __device__ __forceinline__ void add(const uint4& a, const uint4& b, const T* x, int pitch,
                                      int tokens, int lane) {
    const int g = lane / 4;
    const int column = 8 * (lane % 4);
    // The k index of an mma is only a label: words 0 and 1 of every lane make the first, 2 and 3
    // the second, in both operands. Lanes of absent tokens read a real one; nobody looks at theirs.
    const ptx::FragmentA first{{a.x, b.x, a.y, b.y}};
    const ptx::FragmentA second{{a.z, b.z, a.w, b.w}};
    const uint4 low = *reinterpret_cast<const uint4*>(x + (g < tokens ? g : 0) * pitch + column);
    multiply_add<T>(c[0], first, ptx::FragmentB{{low.x, low.y}});
    multiply_add<T>(c[0], second, ptx::FragmentB{{low.z, low.w}});
    if (tokens <= 8) return;
    const int token = g + 8 < tokens ? g + 8 : 0;
    const uint4 high = *reinterpret_cast<const uint4*>(x + token * pitch + column);
    multiply_add<T>(c[1], first, ptx::FragmentB{{high.x, high.y}});
    multiply_add<T>(c[1], second, ptx::FragmentB{{high.z, high.w}});
  }

  __device__ __forceinline__ void store(float* partial, int tokens, int lane) const {
    const int g = lane / 4;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int token = 8 * half + 2 * (lane % 4) + i % 2;
        if (token < tokens) partial[token * kPartialPitch + g + 8 * (i / 2)] = c[half].r[i];
      }
    }
  }
};

/// The same by FMA: the lane sums its own columns of rows g and g + 8 for every token, ascending;
/// the four lanes of a row are added at the end, (0 + 1) + (2 + 3).
template <class W>
struct FmaSums {
  static constexpr int kColumns = kPerLoad<W>;
  float sums[kGemvTokens][2] = {};

  __device__ __forceinline__ void add(const uint4& a, const uint4& b, const float* x, int pitch,
                                      int tokens, int lane) {
    float row_a[kColumns];
    float row_b[kColumns];
    widen_load<W>(a, row_a);
    widen_load<W>(b, row_b);
    const float* const column = x + kColumns * (lane % 4);
#pragma unroll
    for (int token = 0; token < kGemvTokens; ++token) {
      if (token >= tokens) break;
#pragma unroll
      for (int i = 0; i < kColumns; i += 4) {
        const float4 v = *reinterpret_cast<const float4*>(column + token * pitch + i);
        const float values[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          sums[token][0] = __fmaf_rn(row_a[i + j], values[j], sums[token][0]);
          sums[token][1] = __fmaf_rn(row_b[i + j], values[j], sums[token][1]);
        }
      }
    }
  }

  __device__ __forceinline__ void store(float* partial, int tokens, int lane) {
    const int g = lane / 4;
#pragma unroll
    for (int token = 0; token < kGemvTokens; ++token) {
      if (token >= tokens) break;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float sum = sums[token][half];
        sum += __shfl_xor_sync(0xffffffffu, sum, 1);
        sum += __shfl_xor_sync(0xffffffffu, sum, 2);
        if (lane % 4 == token % 4) partial[token * kPartialPitch + g + 8 * half] = sum;
      }
    }
  }
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
template <class W, class A, class Sums, bool kPaired, class List>
__global__ void __launch_bounds__(kGemvThreads, 2)
    expert_gemv_kernel(const __grid_constant__ GemvParams<List> p) {
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

/// One launch of either kind, any list.
template <class W, class A, class Sums, class List>
void launch_gemv(const char* name, const ExpertGemvPlan& plan, const List& list,
                 const RoutedRows& routed, const ExpertMatrix& matrix, bool paired,
                 const void* input, StreamHandle stream, bool overlap_previous) {
  GemvParams<List> params{.list = list, .routed = routed, .matrix = matrix, .input = input};
  params.warps_per_tile = plan.warps_per_tile;
  params.num_tiles = plan.num_tiles;
  params.tiles_per_item = plan.tiles_per_item;
  params.items_per_expert = plan.items_per_expert;
  params.whole_tokens = plan.whole_tokens;
  params.whole_pitch = plan.whole_pitch;
  params.segment_columns = plan.segment_columns;
  params.segment_pitch = plan.segment_pitch;
  params.stage_bytes = static_cast<std::int32_t>(plan.stage_bytes);
  const LaunchShape shape{.grid = dim3(static_cast<unsigned>(plan.blocks)),
                          .block = dim3(kGemvThreads),
                          .shared_bytes = plan.shared_bytes,
                          .stream = to_cuda(stream),
                          .overlap_previous = overlap_previous};
  check_launch(name,
               paired ? launch(name, shape, expert_gemv_kernel<W, A, Sums, true, List>, params)
                      : launch(name, shape, expert_gemv_kernel<W, A, Sums, false, List>, params));
}

/// By kind of arithmetic; each in a .cu of its own.
template <class List>
void launch_gemv_mma(DType dtype, const char* name, const ExpertGemvPlan& plan, const List& list,
                     const RoutedRows& routed, const ExpertMatrix& matrix, bool paired,
                     const void* input, StreamHandle stream, bool overlap_previous);
template <class List>
void launch_gemv_fma(DType weights, const char* name, const ExpertGemvPlan& plan, const List& list,
                     const RoutedRows& routed, const ExpertMatrix& matrix, bool paired,
                     const void* input, StreamHandle stream, bool overlap_previous);

}  // namespace sluice::device
