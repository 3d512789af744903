#pragma once

#include <cstdint>

#include "kernels/active_experts.cuh"
#include "kernels/expert_matrix.cuh"
#include "kernels/expert_tiles.h"
#include "kernels/matrix_launch.cuh"

// The body of the many-token kernels: which tile a block takes, the copies of its operands and what
// becomes of its sums. How it multiplies is `Math`: expert_tiles_{mma,fma}_cuda.cu, which
// instantiate `launch_tiles`.

namespace sluice::device {

inline constexpr int kTileThreads = 256;
inline constexpr int kHalfRows = kTileRows / 2;
/// A tile's sums, [token][row], where its operands were; padded against bank conflicts.
inline constexpr int kSumPitch = kTileRows + 4;
inline constexpr int kSumBytes = kTileTokens * kSumPitch * static_cast<int>(sizeof(float));

template <class List>
struct TileParams {
  List list;
  RoutedRows routed;
  ExpertMatrix matrix;
  const void* input = nullptr;
  std::int32_t min_tokens = 1;
  std::int32_t row_tiles = 0;  // of one expert
  std::int32_t stage_bytes = 0;
};

/// 64 tokens by 128 rows of one busy expert.
struct TileItem {
  const ExpertWeights* expert = nullptr;
  int row_tile = 0;
  std::int32_t first_row = 0;  // routed position of the first token
  int tokens = 0;              // 1 … 64
};

/// Row of the expert's matrix that tile row `row` (0 … 127) is; −1: past the end. The upper half
/// holds the partners of the lower half's rows.
template <bool kPaired>
__device__ __forceinline__ std::int64_t matrix_row(const ExpertMatrix& matrix, int row_tile,
                                                   int row) {
  if constexpr (kPaired) {
    const int channel = row_tile * kHalfRows + row % kHalfRows;
    return channel < matrix.channels ? paired_row(matrix, channel, row / kHalfRows) : -1;
  } else {
    const int found = row_tile * kTileRows + row;
    return found < matrix.channels ? found : -1;
  }
}

/// Ends one token's sums of tile rows `row` and `row` + 64.
template <class A, bool kPaired>
__device__ __forceinline__ void finish(const ExpertMatrix& matrix, const RoutedRows& routed,
                                       const TileItem& item, int token, int row, float low,
                                       float high) {
  const float* const bias = bias_of(matrix, *item.expert);
  const std::int32_t position = item.first_row + token;
  if constexpr (kPaired) {
    const int channel = item.row_tile * kHalfRows + row;
    if (channel < matrix.channels) finish_pair<A>(matrix, bias, position, channel, low, high);
  } else {
    const int first = item.row_tile * kTileRows + row;
    finish_row<A>(matrix, routed, bias, position, first, low);
    finish_row<A>(matrix, routed, bias, position, first + kHalfRows, high);
  }
}

/// Half of the double buffer: `kStep` columns of the tile's 128 weight rows and 64 token rows, and
/// the addresses that one thread copies from, fixed for an item. Math says where chunks go.
template <class Math>
struct TileCopy {
  using W = typename Math::Weight;
  using A = typename Math::Activation;
  static constexpr int kWeightChunks = Math::kStep / kPerLoad<W>;  // of a row, 16 bytes each
  static constexpr int kTokenChunks = Math::kStep / kPerLoad<A>;
  static constexpr int kWeightRowsAtOnce = kTileThreads / kWeightChunks;
  static constexpr int kTokenRowsAtOnce = kTileThreads / kTokenChunks;
  static constexpr int kWeightTurns = kTileRows / kWeightRowsAtOnce;
  static constexpr int kTokenTurns = kTileTokens / kTokenRowsAtOnce;
  static_assert(kTileRows % kWeightRowsAtOnce == 0 && kTileTokens % kTokenRowsAtOnce == 0);

  const W* weights[kWeightTurns];  // null: no such row
  const A* tokens[kTokenTurns];
  const void* anywhere = nullptr;  // an address that may be read; cp.async wants one even for zeros

  template <bool kPaired>
  __device__ __forceinline__ void open(const ExpertMatrix& matrix, const RoutedRows& routed,
                                       const void* input, const TileItem& item) {
    const W* const base = static_cast<const W*>(weights_of(matrix, *item.expert));
    anywhere = base;
    const int thread = static_cast<int>(threadIdx.x);
#pragma unroll
    for (int turn = 0; turn < kWeightTurns; ++turn) {
      const int row = turn * kWeightRowsAtOnce + thread / kWeightChunks;
      const std::int64_t found = matrix_row<kPaired>(matrix, item.row_tile, row);
      weights[turn] = found < 0 ? nullptr : base + found * matrix.columns;
    }
#pragma unroll
    for (int turn = 0; turn < kTokenTurns; ++turn) {
      const int token = turn * kTokenRowsAtOnce + thread / kTokenChunks;
      tokens[turn] = token < item.tokens
                         ? input_row<A>(matrix, routed, input, item.first_row + token)
                         : nullptr;
    }
  }

  /// Starts the copy of columns [begin, begin + kStep) and closes the group. What is past the row's
  /// end, or no row, becomes zeros.
  __device__ __forceinline__ void start(int begin, int columns, unsigned char* half) const {
    const int thread = static_cast<int>(threadIdx.x);
    const int weight_column = begin + thread % kWeightChunks * kPerLoad<W>;
#pragma unroll
    for (int turn = 0; turn < kWeightTurns; ++turn) {
      const int row = turn * kWeightRowsAtOnce + thread / kWeightChunks;
      const bool real = weights[turn] != nullptr && weight_column < columns;
      ptx::cp_async16(Math::weight_chunk(half, row, thread % kWeightChunks),
                      real ? weights[turn] + weight_column : anywhere, real ? 16 : 0);
    }
    const int token_column = begin + thread % kTokenChunks * kPerLoad<A>;
#pragma unroll
    for (int turn = 0; turn < kTokenTurns; ++turn) {
      const int token = turn * kTokenRowsAtOnce + thread / kTokenChunks;
      const bool real = tokens[turn] != nullptr && token_column < columns;
      ptx::cp_async16(Math::token_chunk(half, token, thread % kTokenChunks),
                      real ? tokens[turn] + token_column : anywhere, real ? 16 : 0);
    }
    ptx::cp_async_commit();
  }
};

// One expert's matrix times its many tokens: 64 tokens by 128 rows per item, all columns in one
// block.
//
// Mapping:  persistent blocks; items in expert order, tokens inside rows, so that blocks that run
//           together share weights in L2; static round-robin. 256 threads.
// Traffic:  per item (128 · C) weights and (64 · C) activations through a cp.async double buffer,
//           16 bytes per copy; C · 8192 multiply-adds.
// Numerics: see expert_tiles.h.
// Requires: C % 8 == 0, rows 16-byte aligned; the plan's shared memory.
template <class Math, bool kPaired, class List>
__global__ void __launch_bounds__(kTileThreads, 2)
    expert_tiles_kernel(const __grid_constant__ TileParams<List> p) {
  using A = typename Math::Activation;
  static_assert(kSumBytes <= 2 * Math::kHalfBytes);
  SLUICE_DYNAMIC_SHARED(memory);
  int* const at = reinterpret_cast<int*>(memory + p.stage_bytes);
  int* const first_item = at + p.list.count;
  const int columns = p.matrix.columns;
  const int steps = (columns + Math::kStep - 1) / Math::kStep;

  ptx::grid_dependency_wait();
  ptx::grid_launch_dependents();
  const auto token_tiles = [](int tokens) { return (tokens + kTileTokens - 1) / kTileTokens; };
  const ActiveExperts experts = find_active<kTileThreads>(
      p.list, p.routed, at, first_item,
      [&](int tokens) { return tokens >= p.min_tokens ? p.row_tiles * token_tiles(tokens) : 0; });

  ItemCursor cursor;
  const int num_items = experts.num_items();
  for (int number = static_cast<int>(blockIdx.x); number < num_items;
       number += static_cast<int>(gridDim.x)) {
    const int within = cursor.seek(experts, number);
    const int entry = experts.at[cursor.active];
    const int expert = expert_at(p.list, entry);
    const std::int32_t first_row = p.routed.offsets[expert];
    const int tokens = p.routed.offsets[expert + 1] - first_row;
    const int tiles = token_tiles(tokens);
    TileItem item;
    item.expert = &weights_at(p.list, entry);
    item.row_tile = within / tiles;
    const int first_token = within % tiles * kTileTokens;
    item.first_row = first_row + first_token;
    item.tokens = tokens - first_token < kTileTokens ? tokens - first_token : kTileTokens;

    TileCopy<Math> copy;
    copy.template open<kPaired>(p.matrix, p.routed, p.input, item);
    Math math;
    copy.start(0, columns, memory);
    for (int step = 0; step < steps; ++step) {
      if (step + 1 < steps) {
        copy.start((step + 1) * Math::kStep, columns, memory + (step + 1) % 2 * Math::kHalfBytes);
        ptx::cp_async_wait<1>();
      } else {
        ptx::cp_async_wait<0>();
      }
      __syncthreads();
      math.add(memory + step % 2 * Math::kHalfBytes, item.tokens);
      __syncthreads();  // the next copy goes where this step was read
    }
    // Through shared memory, so that neighbouring threads finish and write neighbouring channels,
    // and the gates are in the code once.
    float* const sums = reinterpret_cast<float*>(memory);
    math.store(sums, item.tokens);
    __syncthreads();
    for (int pair = static_cast<int>(threadIdx.x); pair < item.tokens * kHalfRows;
         pair += kTileThreads) {
      const int token = pair / kHalfRows;
      const int row = pair % kHalfRows;
      const float* const sum = sums + token * kSumPitch + row;
      finish<A, kPaired>(p.matrix, p.routed, item, token, row, sum[0], sum[kHalfRows]);
    }
    __syncthreads();
  }
}

/// By either arithmetic, any list.
template <class Math, class List>
void launch_tiles(const ExpertTilesPlan& plan, const MatrixLaunch<List>& matrix,
                  std::int32_t min_tokens) {
  require<InternalError>(plan.stage_bytes == 2 * Math::kHalfBytes, [&] {
    return std::string(matrix.name) + ": got a plan with a buffer of " +
           std::to_string(plan.stage_bytes) + " bytes, expected " +
           std::to_string(2 * Math::kHalfBytes);
  });
  const TileParams<List> params{.list = matrix.list,
                                .routed = matrix.routed,
                                .matrix = matrix.matrix,
                                .input = matrix.input,
                                .min_tokens = min_tokens,
                                .row_tiles = plan.row_tiles,
                                .stage_bytes = static_cast<std::int32_t>(plan.stage_bytes)};
  launch_matrix(matrix, plan.blocks, kTileThreads, plan.shared_bytes, params,
                expert_tiles_kernel<Math, true, List>, expert_tiles_kernel<Math, false, List>);
}

/// By kind of arithmetic; each in a .cu of its own.
template <class List>
void launch_tiles_mma(DType dtype, const ExpertTilesPlan& plan, const MatrixLaunch<List>& matrix,
                      std::int32_t min_tokens);
template <class List>
void launch_tiles_fma(DType weights, const ExpertTilesPlan& plan, const MatrixLaunch<List>& matrix,
                      std::int32_t min_tokens);

}  // namespace sluice::device
