#include <algorithm>

#include "base/bytes.h"
#include "kernels/expert_gemv.h"
#include "kernels/plan_checks.h"

namespace sluice {
namespace {

// Lanes of a warp that share a row, as in the fragments of mma.sync.
constexpr int kLanesPerRow = 4;
// Columns that are worth a warp of their own. Numerics: a change of it changes results.
constexpr std::int64_t kColumnsPerWarp = 512;

struct Matrix {
  std::int64_t columns = 0;
  std::int64_t tiles = 0;
};

int warps_per_tile(std::int64_t columns) {
  int warps = 1;
  while (2 * warps <= kGemvWarps && 2 * warps <= ceil_div(columns, kColumnsPerWarp)) warps *= 2;
  return warps;
}

// Rows start 64 bytes past a multiple of 128, so that the eight lanes of two rows that one
// shared-memory cycle serves are in different banks.
std::int64_t stage_pitch_bytes(std::int64_t columns, std::size_t element) {
  return static_cast<std::int64_t>(
      align_up(static_cast<std::size_t>(columns) * element, std::size_t{128}) + 64);
}

ExpertGemvPlan plan_matrix(const char* kernel, const ExpertProblem& problem, const Matrix& matrix,
                           int num_listed, std::int64_t num_entries, const GpuTraits& gpu) {
  ExpertGemvPlan plan;
  plan.warps_per_tile = warps_per_tile(matrix.columns);
  plan.num_tiles = static_cast<int>(matrix.tiles);
  plan.tiles_per_item = kGemvWarps / plan.warps_per_tile;
  plan.items_per_expert = static_cast<int>(ceil_div(matrix.tiles, plan.tiles_per_item));
  plan.blocks = persistent_blocks(std::int64_t{num_listed} * plan.items_per_expert, gpu);
  plan.list_capacity = num_listed;

  const std::size_t element = element_bytes(problem.activations);
  const auto pitch = [&](std::int64_t columns) { return stage_pitch_bytes(columns, element); };
  // What one turn of all warps takes of a row; segments are multiples, so that a warp's columns and
  // their order are the same whatever is staged at once.
  const std::int64_t stride = plan.warps_per_tile * kGemvDepth * kLanesPerRow *
                              (16 / static_cast<std::int64_t>(element_bytes(problem.weights)));
  const std::int64_t tokens = std::clamp<std::int64_t>(num_entries, 1, kGemvTokens);
  const std::int64_t row = ceil_div(matrix.columns, stride) * stride;

  const std::size_t beside = kGemvStaticSharedBytes + active_list_bytes(num_listed);
  const std::size_t half = gpu.shared_bytes_per_multiprocessor() / kBlocksPerMultiprocessor -
                           GpuTraits::kReservedSharedBytes;
  // One segment must fit, be it at the price of the second block.
  const std::int64_t budget =
      std::max(tokens * pitch(std::min(stride, matrix.columns)),
               static_cast<std::int64_t>(half) - static_cast<std::int64_t>(beside));
  std::int64_t segment = std::min(row, stride);
  while (segment < row && tokens * pitch(std::min(segment + stride, matrix.columns)) <= budget) {
    segment += stride;
  }
  plan.segment_columns = static_cast<int>(segment);
  plan.segment_pitch = static_cast<int>(pitch(std::min(segment, matrix.columns)) /
                                        static_cast<std::int64_t>(element));
  plan.whole_pitch = static_cast<int>(pitch(matrix.columns) / static_cast<std::int64_t>(element));
  plan.whole_tokens = static_cast<int>(std::min(tokens, budget / pitch(matrix.columns)));
  plan.stage_bytes = static_cast<std::size_t>(std::max(
      plan.whole_tokens * pitch(matrix.columns),
      plan.whole_tokens == tokens ? 0 : tokens * pitch(std::min(segment, matrix.columns))));
  plan.shared_bytes = plan.stage_bytes + active_list_bytes(num_listed);
  check_shared(kernel, kGemvStaticSharedBytes + plan.shared_bytes, num_listed, gpu);
  return plan;
}

}  // namespace

ExpertGemvPlan plan_expert_gate_up(const ExpertProblem& problem, int num_listed,
                                   std::int64_t num_entries, const GpuTraits& gpu) {
  check_expert_problem("expert_gate_up", problem);
  check_gate("expert_gate_up", problem);
  // A pair of gate and up rows is two of a tile's sixteen.
  const std::int64_t tiles =
      is_gated(problem.gate.kind) ? problem.intermediate / 8 : ceil_div(problem.intermediate, 16);
  return plan_matrix("expert_gate_up", problem, {.columns = problem.hidden, .tiles = tiles},
                     num_listed, num_entries, gpu);
}

ExpertGemvPlan plan_expert_down(const ExpertProblem& problem, int num_listed,
                                std::int64_t num_entries, const GpuTraits& gpu) {
  check_expert_problem("expert_down", problem);
  return plan_matrix("expert_down", problem,
                     {.columns = problem.intermediate, .tiles = ceil_div(problem.hidden, 16)},
                     num_listed, num_entries, gpu);
}

std::string ExpertGemvPlan::text() const {
  return "blocks " + std::to_string(blocks) + ", items/expert " + std::to_string(items_per_expert) +
         " of " + std::to_string(tiles_per_item) + " tiles of " + std::to_string(num_tiles) +
         ", warps/tile " + std::to_string(warps_per_tile) + ", staged whole to " +
         std::to_string(whole_tokens) + " tokens, else " + std::to_string(segment_columns) +
         " columns, shared " + std::to_string(shared_bytes);
}

}  // namespace sluice
