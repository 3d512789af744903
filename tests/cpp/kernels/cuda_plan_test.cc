// Plans of the CUDA kernels over experts: pure functions, tested without CUDA. (route's plan is
// tested beside its kernel.)
#include <gtest/gtest.h>

#include <string>
#include <vector>

#include "base/error.h"
#include "kernels/expert_gemv.h"
#include "kernels/expert_tiles.h"

namespace sluice {
namespace {

// Shared memory per block and multiprocessors of the architectures that are built for.
constexpr GpuTraits kH200 = {.num_multiprocessors = 132, .shared_bytes_per_block = 227 * 1024};
constexpr GpuTraits kA100 = {.num_multiprocessors = 108, .shared_bytes_per_block = 163 * 1024};
constexpr GpuTraits kRtx4090 = {.num_multiprocessors = 128, .shared_bytes_per_block = 99 * 1024};
constexpr GpuTraits kTiny = {.num_multiprocessors = 1, .shared_bytes_per_block = 99 * 1024};

std::string text(const ExpertProblem& problem, int num_listed, std::int64_t num_entries,
                 const GpuTraits& gpu) {
  return std::string(dtype_name(problem.weights)) + "/" +
         std::string(dtype_name(problem.activations)) + " H " + std::to_string(problem.hidden) +
         ", I " + std::to_string(problem.intermediate) + ", " + std::to_string(num_listed) +
         " experts, " + std::to_string(num_entries) + " entries, " +
         std::to_string(gpu.shared_bytes_per_block) + " bytes";
}

void check_gemv(const ExpertGemvPlan& plan, const ExpertProblem& problem,
                std::int64_t rows_per_tile, std::int64_t rows, std::int64_t columns, int num_listed,
                std::int64_t num_entries, const GpuTraits& gpu) {
  SCOPED_TRACE(text(problem, num_listed, num_entries, gpu) + ": " + plan.text());
  const auto element = static_cast<std::int64_t>(element_bytes(problem.activations));
  const std::int64_t tokens = std::min<std::int64_t>(num_entries, kGemvTokens);
  const std::int64_t stride =
      plan.warps_per_tile * 16 * (16 / static_cast<std::int64_t>(element_bytes(problem.weights)));
  // The split is the row length's alone: largest power of two ≤ min(8, ⌈C / 512⌉).
  const std::int64_t parts = std::min<std::int64_t>(8, (columns + 511) / 512);
  EXPECT_TRUE(plan.warps_per_tile <= parts && 2 * plan.warps_per_tile > parts);
  EXPECT_EQ(8 % plan.warps_per_tile, 0);
  EXPECT_EQ(plan.tiles_per_item, 8 / plan.warps_per_tile);
  // Every row in a tile, every tile in an item, none over.
  EXPECT_EQ(plan.num_tiles, (rows + rows_per_tile - 1) / rows_per_tile);
  EXPECT_GE(plan.items_per_expert * plan.tiles_per_item, plan.num_tiles);
  EXPECT_LT((plan.items_per_expert - 1) * plan.tiles_per_item, plan.num_tiles);
  EXPECT_TRUE(plan.blocks >= 1 && plan.blocks <= 2 * gpu.num_multiprocessors);
  // Either every row fits whole, or the segments of the most tokens do.
  EXPECT_LE(static_cast<std::size_t>(plan.whole_tokens * plan.whole_pitch * element),
            plan.stage_bytes);
  EXPECT_GE(plan.whole_pitch, columns);
  if (plan.whole_tokens < tokens) {
    EXPECT_EQ(plan.segment_columns % stride, 0);
    EXPECT_GE(plan.segment_pitch, std::min<std::int64_t>(plan.segment_columns, columns));
    EXPECT_LE(static_cast<std::size_t>(tokens * plan.segment_pitch * element), plan.stage_bytes);
  }
  // Rows that one cycle of shared memory serves lie 64 bytes apart, modulo its 128.
  EXPECT_EQ(plan.whole_pitch * element % 128, 64);
  EXPECT_EQ(plan.segment_pitch * element % 128, 64);
  EXPECT_EQ(plan.stage_bytes % 16, 0u);
  EXPECT_GE(plan.shared_bytes, plan.stage_bytes + static_cast<std::size_t>(2 * num_listed + 1) * 4);
  EXPECT_LE(plan.shared_bytes + kGemvStaticSharedBytes, gpu.shared_bytes_per_block);
}

void check_tiles(const ExpertTilesPlan& plan, const ExpertProblem& problem, std::int64_t rows,
                 bool paired, int num_listed, std::int64_t num_entries, const GpuTraits& gpu) {
  SCOPED_TRACE(text(problem, num_listed, num_entries, gpu) + ": " + plan.text());
  EXPECT_EQ(plan.paired, paired);
  const std::int64_t rows_per_tile = paired ? 64 : 128;
  EXPECT_EQ(plan.row_tiles, (rows + rows_per_tile - 1) / rows_per_tile);
  EXPECT_TRUE(plan.blocks >= 1 && plan.blocks <= 2 * gpu.num_multiprocessors);
  // The sums of a tile, [64][132] fp32, go where its operands were.
  EXPECT_GE(plan.stage_bytes, 64u * 132 * 4);
  EXPECT_GE(plan.shared_bytes, plan.stage_bytes + static_cast<std::size_t>(2 * num_listed + 1) * 4);
  EXPECT_LE(plan.shared_bytes + kTileStaticSharedBytes, gpu.shared_bytes_per_block);
}

TEST(CudaPlans, AreLegalOverASweep) {
  constexpr std::int64_t kWidths[] = {8,    16,   64,   120,  512,  520,  768,   1024, 1408,
                                      1536, 2048, 2056, 2880, 4096, 7168, 14336, 28672};
  const std::pair<DType, DType> types[] = {{DType::kBF16, DType::kBF16},
                                           {DType::kF16, DType::kF16},
                                           {DType::kF32, DType::kF32},
                                           {DType::kBF16, DType::kF32}};
  for (const GpuTraits& gpu : {kH200, kA100, kRtx4090, kTiny}) {
    for (const auto& [weights, activations] : types) {
      for (const std::int64_t hidden : kWidths) {
        for (const std::int64_t intermediate : kWidths) {
          for (const GateKind gate : {GateKind::kSilu, GateKind::kRelu2}) {
            for (const int listed : {1, 8, 128, 512}) {
              for (const std::int64_t entries : {1, 8, 4096}) {
                const ExpertProblem problem{.weights = weights,
                                            .activations = activations,
                                            .hidden = hidden,
                                            .intermediate = intermediate,
                                            .gate = {.kind = gate}};
                const bool gated = is_gated(gate);
                check_gemv(plan_expert_gate_up(problem, listed, entries, gpu), problem,
                           gated ? 8 : 16, intermediate, hidden, listed, entries, gpu);
                check_gemv(plan_expert_down(problem, listed, entries, gpu), problem, 16, hidden,
                           intermediate, listed, entries, gpu);
                check_tiles(plan_tile_gate_up(problem, listed, entries, gpu), problem, intermediate,
                            gated, listed, entries, gpu);
                check_tiles(plan_tile_gate_up_raw(problem, 2 * intermediate, listed, entries, gpu),
                            problem, 2 * intermediate, false, listed, entries, gpu);
                check_tiles(plan_tile_down(problem, listed, entries, gpu), problem, hidden, false,
                            listed, entries, gpu);
                if (::testing::Test::HasFailure()) return;
              }
            }
          }
        }
      }
    }
  }
}

TEST(CudaPlans, OfNamedModelsStayAsTheyAre) {
  struct Named {
    const char* name;
    ExpertProblem problem;
    int top_k;
  };
  const Named models[] = {
      {"Mixtral-8x7B", {.hidden = 4096, .intermediate = 14336}, 2},
      {"Qwen3-30B-A3B", {.hidden = 2048, .intermediate = 768}, 8},
      {"OLMoE-1B-7B", {.hidden = 2048, .intermediate = 1024}, 8},
      {"gpt-oss-20b",
       {.hidden = 2880, .intermediate = 2880, .gate = {.kind = GateKind::kOaiSwiglu}},
       4},
      {"DeepSeek-V2-Lite", {.hidden = 2048, .intermediate = 1408}, 6},
  };
  std::vector<std::string> lines;
  for (const Named& model : models) {
    for (const std::int64_t tokens : {1, 16}) {
      const std::int64_t entries = tokens * model.top_k;
      const std::string name = std::string(model.name) + ", " + std::to_string(tokens) + ": ";
      const auto listed = static_cast<int>(entries);
      lines.push_back(name + plan_expert_gate_up(model.problem, listed, entries, kH200).text());
      lines.push_back(name + plan_expert_down(model.problem, listed, entries, kH200).text());
    }
    const std::string name = std::string(model.name) + ", 1024: ";
    lines.push_back(name + plan_tile_gate_up(model.problem, 64, 1024 * model.top_k, kH200).text());
    lines.push_back(name + plan_tile_down(model.problem, 64, 1024 * model.top_k, kH200).text());
  }
  const std::vector<std::string> golden = {
      "Mixtral-8x7B, 1: "
      "blocks 264, items/expert 1792 of 1 tiles of 1792, warps/tile 8, staged whole to 2 tokens, "
      "else 4096 columns, shared 16532",
      "Mixtral-8x7B, 1: "
      "blocks 264, items/expert 256 of 1 tiles of 256, warps/tile 8, staged whole to 2 tokens, "
      "else 14336 columns, shared 57492",
      "Mixtral-8x7B, 16: "
      "blocks 264, items/expert 1792 of 1 tiles of 1792, warps/tile 8, staged whole to 11 tokens, "
      "else 2048 columns, shared 91076",
      "Mixtral-8x7B, 16: "
      "blocks 264, items/expert 256 of 1 tiles of 256, warps/tile 8, staged whole to 3 tokens, "
      "else 2048 columns, shared 86468",
      "Mixtral-8x7B, 1024: "
      "blocks 264, row tiles/expert 224 of 64 + 64 rows, shared 49668",
      "Mixtral-8x7B, 1024: "
      "blocks 264, row tiles/expert 32 of 128 rows, shared 49668",
      "Qwen3-30B-A3B, 1: "
      "blocks 264, items/expert 48 of 2 tiles of 96, warps/tile 4, staged whole to 8 tokens, else "
      "2048 columns, shared 33348",
      "Qwen3-30B-A3B, 1: "
      "blocks 256, items/expert 32 of 4 tiles of 128, warps/tile 2, staged whole to 8 tokens, else "
      "768 columns, shared 12868",
      "Qwen3-30B-A3B, 16: "
      "blocks 264, items/expert 48 of 2 tiles of 96, warps/tile 4, staged whole to 16 tokens, else "
      "2048 columns, shared 67588",
      "Qwen3-30B-A3B, 16: "
      "blocks 264, items/expert 32 of 4 tiles of 128, warps/tile 2, staged whole to 16 tokens, "
      "else 768 columns, shared 26628",
      "Qwen3-30B-A3B, 1024: "
      "blocks 264, row tiles/expert 12 of 64 + 64 rows, shared 49668",
      "Qwen3-30B-A3B, 1024: "
      "blocks 264, row tiles/expert 16 of 128 rows, shared 49668",
      "OLMoE-1B-7B, 1: "
      "blocks 264, items/expert 64 of 2 tiles of 128, warps/tile 4, staged whole to 8 tokens, else "
      "2048 columns, shared 33348",
      "OLMoE-1B-7B, 1: "
      "blocks 256, items/expert 32 of 4 tiles of 128, warps/tile 2, staged whole to 8 tokens, else "
      "1024 columns, shared 16964",
      "OLMoE-1B-7B, 16: "
      "blocks 264, items/expert 64 of 2 tiles of 128, warps/tile 4, staged whole to 16 tokens, "
      "else 2048 columns, shared 67588",
      "OLMoE-1B-7B, 16: "
      "blocks 264, items/expert 32 of 4 tiles of 128, warps/tile 2, staged whole to 16 tokens, "
      "else 1024 columns, shared 34820",
      "OLMoE-1B-7B, 1024: "
      "blocks 264, row tiles/expert 16 of 64 + 64 rows, shared 49668",
      "OLMoE-1B-7B, 1024: "
      "blocks 264, row tiles/expert 16 of 128 rows, shared 49668",
      "gpt-oss-20b, 1: "
      "blocks 264, items/expert 180 of 2 tiles of 360, warps/tile 4, staged whole to 4 tokens, "
      "else 3072 columns, shared 23332",
      "gpt-oss-20b, 1: "
      "blocks 264, items/expert 90 of 2 tiles of 180, warps/tile 4, staged whole to 4 tokens, else "
      "3072 columns, shared 23332",
      "gpt-oss-20b, 16: "
      "blocks 264, items/expert 180 of 2 tiles of 360, warps/tile 4, staged whole to 16 tokens, "
      "else 3072 columns, shared 93700",
      "gpt-oss-20b, 16: "
      "blocks 264, items/expert 90 of 2 tiles of 180, warps/tile 4, staged whole to 16 tokens, "
      "else 3072 columns, shared 93700",
      "gpt-oss-20b, 1024: "
      "blocks 264, row tiles/expert 45 of 64 + 64 rows, shared 49668",
      "gpt-oss-20b, 1024: "
      "blocks 264, row tiles/expert 23 of 128 rows, shared 49668",
      "DeepSeek-V2-Lite, 1: "
      "blocks 264, items/expert 88 of 2 tiles of 176, warps/tile 4, staged whole to 6 tokens, else "
      "2048 columns, shared 25012",
      "DeepSeek-V2-Lite, 1: "
      "blocks 192, items/expert 32 of 4 tiles of 128, warps/tile 2, staged whole to 6 tokens, else "
      "1536 columns, shared 17332",
      "DeepSeek-V2-Lite, 16: "
      "blocks 264, items/expert 88 of 2 tiles of 176, warps/tile 4, staged whole to 16 tokens, "
      "else 2048 columns, shared 67332",
      "DeepSeek-V2-Lite, 16: "
      "blocks 264, items/expert 32 of 4 tiles of 128, warps/tile 2, staged whole to 16 tokens, "
      "else 1536 columns, shared 46852",
      "DeepSeek-V2-Lite, 1024: "
      "blocks 264, row tiles/expert 22 of 64 + 64 rows, shared 49668",
      "DeepSeek-V2-Lite, 1024: "
      "blocks 264, row tiles/expert 16 of 128 rows, shared 49668",
  };
  ASSERT_EQ(lines.size(), golden.size());
  for (std::size_t i = 0; i < lines.size(); ++i) EXPECT_EQ(lines[i], golden[i]);
}

}  // namespace
}  // namespace sluice
