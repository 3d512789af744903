#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

#include "base/stream.h"
#include "kernels/expert_list.h"
#include "kernels/gpu_traits.h"

// The decode pair: an expert's two matrices for few tokens, on a GPU.
//
//   launch_expert_gate_up   h = gate(w13 · x + b13)       [T · K, I], one row per routed position
//   launch_expert_down      scratch = w2 · h + b2         [T · K, H] fp32, one row per entry
//
// Bound by the reading of the weights, each once, whatever the number of tokens. Experts of the
// list with no row, or with more than `kGemvTokens`, are left to others: the kernels find out
// themselves, from the offsets, and the host decides nothing between launches.
//
// Numerics: bf16 and fp16 multiply on tensor cores into fp32; fp32 activations, over any weights,
// by fp32 FMA with the weights widened exactly (never tf32). The columns of a row are cut over
// `warps_per_tile` warps in turns of a block of 128 (fp32 weights: 64), each warp adds its own in
// ascending order, the warps' sums are added in warp order, then the bias; the gate's maths is that
// of the CPU (kernels/elementwise.h); h is rounded once. So a row's bits depend on its own token
// and on the expert alone: not on the tokens beside it (≤ 15), the launch, the list or the GPU's
// size.

namespace sluice {

/// Most tokens of one expert that the decode pair takes. Part of law 1: a constant of the expert's
/// own token count, never tuned at run time.
inline constexpr int kGemvTokens = 16;

/// How one of the two launches cuts its work. An item is `tiles_per_item` neighbouring tiles of one
/// expert, 16 rows of its matrix each, that a block computes at once.
struct ExpertGemvPlan {
  int warps_per_tile = 1;  // fixed by the row length: numerics
  int num_tiles = 0;       // of one expert
  int tiles_per_item = 8;  // 8 / warps_per_tile
  int items_per_expert = 0;
  int blocks = 0;
  // Activations in shared memory: whole rows for up to `whole_tokens` tokens, else
  // `segment_columns` at a time. Pitches in elements.
  int whole_tokens = 0;
  int whole_pitch = 0;
  int segment_columns = 0;
  int segment_pitch = 0;
  int list_capacity = 0;
  std::size_t stage_bytes = 0;
  std::size_t shared_bytes = 0;  // dynamic, with the list of experts behind the activations
  [[nodiscard]] std::string text() const;
};

/// A block's warps, and the 16-byte loads of each of its two rows that a lane has in flight: plans
/// cut rows by what all of them take in one turn.
inline constexpr int kGemvWarps = 8;
inline constexpr int kGemvDepth = 4;

/// Shared memory that the kernels declare themselves.
inline constexpr std::size_t kGemvStaticSharedBytes = 21 * 1024;

/// Plans for a list of `num_listed` experts (its capacity: E for a table) and a call of
/// `num_entries` = T · K entries, any of which may name the same expert. Pure; residency and
/// routing do not enter. Errors: ConfigError naming the width when H or I is not a multiple of 8,
/// when the weights are neither the activations' type nor read by fp32 activations, or when the
/// gate is generic.
[[nodiscard]] ExpertGemvPlan plan_expert_gate_up(const ExpertProblem& problem, int num_listed,
                                                 std::int64_t num_entries, const GpuTraits& gpu);
[[nodiscard]] ExpertGemvPlan plan_expert_down(const ExpertProblem& problem, int num_listed,
                                              std::int64_t num_entries, const GpuTraits& gpu);

/// Device pointers, 16-byte aligned (as are the rows of weights: slots are 64-byte aligned).
struct ExpertGateUpArgs {
  RoutedRows routed;
  const void* hidden = nullptr;  // [T, H], activations' type
  void* h = nullptr;             // [T · K, I], activations' type, by routed position; written
};
struct ExpertDownArgs {
  RoutedRows routed;
  const void* h = nullptr;   // as written by gate_up
  float* scratch = nullptr;  // [T · K, H], by entry; written
};

/// `overlap_previous` lets the kernel start before the work ahead in the stream has ended: right
/// only where that work is itself a kernel of this chain (route, gate_up, down, combine), with no
/// copy and no event wait between. down, which then reads the list, the offsets and its first
/// weights early, must follow a gate_up that followed what wrote them.
/// Errors: ConfigError for a pointer that is not aligned; DeviceError naming the kernel.
template <ExpertList List>
void launch_expert_gate_up(const ExpertProblem& problem, const ExpertGemvPlan& plan,
                           const List& experts, const ExpertGateUpArgs& args, StreamHandle stream,
                           bool overlap_previous = false);
template <ExpertList List>
void launch_expert_down(const ExpertProblem& problem, const ExpertGemvPlan& plan,
                        const List& experts, const ExpertDownArgs& args, StreamHandle stream,
                        bool overlap_previous = false);

}  // namespace sluice
