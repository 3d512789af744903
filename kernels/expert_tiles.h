#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

#include "base/stream.h"
#include "kernels/expert_list.h"
#include "kernels/gpu_traits.h"

// An expert's two matrices for many tokens, on a GPU, read where they lie in their slots. Tiles of
// 64 tokens by 128 rows (64 gate rows and their 64 up rows).
//
//   launch_tile_gate_up       h = gate(w13 · x + b13)      [T · K, I]
//   launch_tile_gate_up_raw   w13 · x + b13                [T · K, R], for a gate of the caller's
//   launch_tile_down          w2 · h + b2                  [T · K, H] fp32 by entry
//   launch_tile_down_compact  w2 · h + b2                  [T · K, H] by position, for a callback
//
// Experts with fewer than `min_tokens` rows are left to the decode pair (expert_gemv.h); 1 takes
// all, for sites that need a callback. How many tiles there are is found in the kernel.
//
// Numerics: as expert_gemv.h, but one thread's fp32 sum takes all columns of a row in ascending
// order (tensor cores: 16 at a time). A row's bits depend on its own token and on the expert alone:
// not on the tokens beside it, the launch, the list or the GPU's size.

namespace sluice {

inline constexpr int kTileTokens = 64;
inline constexpr int kTileRows = 128;
/// Shared memory that the kernels declare themselves.
inline constexpr std::size_t kTileStaticSharedBytes = 1024;

struct ExpertTilesPlan {
  bool paired = false;  // a tile is 64 gate rows and their 64 up rows
  int row_tiles = 0;    // of one expert
  int blocks = 0;
  int list_capacity = 0;
  std::size_t stage_bytes = 0;   // both halves of the double buffer
  std::size_t shared_bytes = 0;  // dynamic, with the list of experts behind them
  [[nodiscard]] std::string text() const;
};

/// Plans for a list of `num_listed` experts (its capacity) and a call of `num_tokens` · `top_k`
/// entries. Pure.
/// Errors: ConfigError naming the width when H or I is not a multiple of 8, when the weights are
/// neither the activations' type nor read by fp32 activations; for gate_up when the gate is
/// generic.
[[nodiscard]] ExpertTilesPlan plan_tile_gate_up(const ExpertProblem& problem, int num_listed,
                                                std::int64_t num_entries, const GpuTraits& gpu);
/// `w13_rows`: 2I or I; a generic gate does not say which.
[[nodiscard]] ExpertTilesPlan plan_tile_gate_up_raw(const ExpertProblem& problem,
                                                    std::int64_t w13_rows, int num_listed,
                                                    std::int64_t num_entries, const GpuTraits& gpu);
[[nodiscard]] ExpertTilesPlan plan_tile_down(const ExpertProblem& problem, int num_listed,
                                             std::int64_t num_entries, const GpuTraits& gpu);

/// Device pointers, 16-byte aligned.
struct TileGateUpArgs {
  RoutedRows routed;
  std::int32_t min_tokens = 1;   // fewest rows of an expert that this launch takes
  const void* hidden = nullptr;  // [T, H], activations' type
  /// Activations' type, by routed position, written: h [T · K, I]; raw: [T · K, R] in w13's order
  /// of rows (interleaved where that is), biased.
  void* out = nullptr;
};
struct TileDownArgs {
  RoutedRows routed;
  std::int32_t min_tokens = 1;
  const void* h = nullptr;  // [T · K, I], by routed position
  /// Written: fp32 by entry; compact: the activations' type by routed position.
  void* out = nullptr;
};

/// `overlap_previous`: as in expert_gemv.h. Errors: likewise.
template <ExpertList List>
void launch_tile_gate_up(const ExpertProblem& problem, const ExpertTilesPlan& plan,
                         const List& experts, const TileGateUpArgs& args, StreamHandle stream,
                         bool overlap_previous = false);
template <ExpertList List>
void launch_tile_gate_up_raw(const ExpertProblem& problem, std::int64_t w13_rows,
                             const ExpertTilesPlan& plan, const List& experts,
                             const TileGateUpArgs& args, StreamHandle stream,
                             bool overlap_previous = false);
template <ExpertList List>
void launch_tile_down(const ExpertProblem& problem, const ExpertTilesPlan& plan,
                      const List& experts, const TileDownArgs& args, StreamHandle stream,
                      bool overlap_previous = false);
template <ExpertList List>
void launch_tile_down_compact(const ExpertProblem& problem, const ExpertTilesPlan& plan,
                              const List& experts, const TileDownArgs& args, StreamHandle stream,
                              bool overlap_previous = false);

}  // namespace sluice
