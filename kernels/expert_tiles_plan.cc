#include "kernels/expert_tiles.h"
#include "kernels/plan_checks.h"

namespace sluice {
namespace {

// Bytes of the double buffer. fp32 activations: 32 columns at a time and 16 bytes of padding per
// row; else 64 columns. The launchers compare this with what the kernels were compiled for.
std::size_t stage_bytes(const ExpertProblem& problem) {
  const std::size_t weight = element_bytes(problem.weights);
  if (problem.activations != DType::kF32) return 2 * (kTileRows + kTileTokens) * 64 * weight;
  return 2 * (kTileRows * (32 * weight + 16) + kTileTokens * (32 * sizeof(float) + 16));
}

ExpertTilesPlan plan_matrix(const char* kernel, const ExpertProblem& problem, std::int64_t rows,
                            bool paired, int num_listed, std::int64_t num_entries,
                            const GpuTraits& gpu) {
  check_expert_problem(kernel, problem);
  ExpertTilesPlan plan;
  plan.paired = paired;
  plan.row_tiles = static_cast<int>(ceil_div(rows, paired ? kTileRows / 2 : kTileRows));
  plan.list_capacity = num_listed;
  plan.stage_bytes = stage_bytes(problem);
  plan.shared_bytes = plan.stage_bytes + active_list_bytes(num_listed);
  // The most items: one token tile per expert that has rows, and one more per 64 entries.
  const std::int64_t token_tiles =
      std::min<std::int64_t>(num_listed, num_entries) + num_entries / kTileTokens;
  plan.blocks = persistent_blocks(token_tiles * plan.row_tiles, gpu);
  check_shared(kernel, kTileStaticSharedBytes + plan.shared_bytes, num_listed, gpu);
  return plan;
}

}  // namespace

ExpertTilesPlan plan_tile_gate_up(const ExpertProblem& problem, int num_listed,
                                  std::int64_t num_entries, const GpuTraits& gpu) {
  check_gate("tile_gate_up", problem);
  return plan_matrix("tile_gate_up", problem, problem.intermediate, is_gated(problem.gate.kind),
                     num_listed, num_entries, gpu);
}

ExpertTilesPlan plan_tile_gate_up_raw(const ExpertProblem& problem, std::int64_t w13_rows,
                                      int num_listed, std::int64_t num_entries,
                                      const GpuTraits& gpu) {
  require<ConfigError>(w13_rows > 0 && w13_rows % 8 == 0, [&] {
    return "tile_gate_up_raw: got " + std::to_string(w13_rows) +
           " rows of w13, expected a positive multiple of 8";
  });
  return plan_matrix("tile_gate_up_raw", problem, w13_rows, false, num_listed, num_entries, gpu);
}

ExpertTilesPlan plan_tile_down(const ExpertProblem& problem, int num_listed,
                               std::int64_t num_entries, const GpuTraits& gpu) {
  return plan_matrix("tile_down", problem, problem.hidden, false, num_listed, num_entries, gpu);
}

std::string ExpertTilesPlan::text() const {
  return "blocks " + std::to_string(blocks) + ", row tiles/expert " + std::to_string(row_tiles) +
         (paired ? " of 64 + 64 rows" : " of 128 rows") + ", shared " +
         std::to_string(shared_bytes);
}

}  // namespace sluice
