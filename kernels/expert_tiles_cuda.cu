// The launchers of the many-token kernels: which matrix, which arithmetic, which output.
#include <string>

#include "kernels/expert_tiles.cuh"

namespace sluice {
namespace {

template <class List>
void launch_matrix(const char* name, const ExpertProblem& problem, const ExpertTilesPlan& plan,
                   const List& list, const RoutedRows& routed, const device::ExpertMatrix& matrix,
                   bool paired, std::int32_t min_tokens, const void* input, StreamHandle stream,
                   bool overlap_previous) {
  require<InternalError>(list.count <= plan.list_capacity && paired == plan.paired, [&] {
    return std::string(name) + ": got " + std::to_string(list.count) + " experts, " +
           (paired ? "paired" : "single") +
           " rows, expected what the plan was made for: " + plan.text();
  });
  require<InternalError>(min_tokens >= 1, [&] {
    return std::string(name) + ": got min_tokens " + std::to_string(min_tokens) +
           ", expected 1 or more";
  });
  check_aligned(name, "the input rows", input);
  check_aligned(name, "the output rows", matrix.out);
  if (list.count == 0) return;
  if (problem.activations == DType::kF32) {
    device::launch_tiles_fma(problem.weights, name, plan, list, routed, matrix, min_tokens, input,
                             stream, overlap_previous);
  } else {
    device::launch_tiles_mma(problem.weights, name, plan, list, routed, matrix, min_tokens, input,
                             stream, overlap_previous);
  }
}

template <class List>
void gate_up(const ExpertProblem& problem, const ExpertTilesPlan& plan, const List& experts,
             const TileGateUpArgs& args, StreamHandle stream, bool overlap_previous) {
  const auto intermediate = static_cast<std::int32_t>(problem.intermediate);
  launch_matrix("tile_gate_up", problem, plan, experts, args.routed,
                {.is_w2 = false,
                 .interleaved = problem.gate.interleaved,
                 .channels = intermediate,
                 .columns = static_cast<std::int32_t>(problem.hidden),
                 .out_pitch = intermediate,
                 .output = device::Output::kGate,
                 .gate = problem.gate,
                 .out = args.out},
                is_gated(problem.gate.kind), args.min_tokens, args.hidden, stream,
                overlap_previous);
}

// Rows as they lie: whether gate and up rows alternate is the caller's business.
template <class List>
void gate_up_raw(std::int64_t w13_rows, const ExpertProblem& problem, const ExpertTilesPlan& plan,
                 const List& experts, const TileGateUpArgs& args, StreamHandle stream,
                 bool overlap_previous) {
  const auto rows = static_cast<std::int32_t>(w13_rows);
  launch_matrix("tile_gate_up_raw", problem, plan, experts, args.routed,
                {.is_w2 = false,
                 .channels = rows,
                 .columns = static_cast<std::int32_t>(problem.hidden),
                 .out_pitch = rows,
                 .output = device::Output::kRaw,
                 .out = args.out},
                false, args.min_tokens, args.hidden, stream, overlap_previous);
}

template <class List>
void down(device::Output output, const ExpertProblem& problem, const ExpertTilesPlan& plan,
          const List& experts, const TileDownArgs& args, StreamHandle stream,
          bool overlap_previous) {
  const auto hidden = static_cast<std::int32_t>(problem.hidden);
  launch_matrix(output == device::Output::kRaw ? "tile_down_compact" : "tile_down", problem, plan,
                experts, args.routed,
                {.is_w2 = true,
                 .channels = hidden,
                 .columns = static_cast<std::int32_t>(problem.intermediate),
                 .out_pitch = hidden,
                 .output = output,
                 .out = args.out},
                false, args.min_tokens, args.h, stream, overlap_previous);
}

}  // namespace

void launch_tile_gate_up(const ExpertProblem& problem, const ExpertTilesPlan& plan,
                         const ExpertEntries& experts, const TileGateUpArgs& args,
                         StreamHandle stream, bool overlap_previous) {
  gate_up(problem, plan, experts, args, stream, overlap_previous);
}
void launch_tile_gate_up(const ExpertProblem& problem, const ExpertTilesPlan& plan,
                         const ExpertTable& experts, const TileGateUpArgs& args,
                         StreamHandle stream, bool overlap_previous) {
  gate_up(problem, plan, experts, args, stream, overlap_previous);
}
void launch_tile_gate_up_raw(const ExpertProblem& problem, std::int64_t w13_rows,
                             const ExpertTilesPlan& plan, const ExpertEntries& experts,
                             const TileGateUpArgs& args, StreamHandle stream,
                             bool overlap_previous) {
  gate_up_raw(w13_rows, problem, plan, experts, args, stream, overlap_previous);
}
void launch_tile_gate_up_raw(const ExpertProblem& problem, std::int64_t w13_rows,
                             const ExpertTilesPlan& plan, const ExpertTable& experts,
                             const TileGateUpArgs& args, StreamHandle stream,
                             bool overlap_previous) {
  gate_up_raw(w13_rows, problem, plan, experts, args, stream, overlap_previous);
}
void launch_tile_down(const ExpertProblem& problem, const ExpertTilesPlan& plan,
                      const ExpertEntries& experts, const TileDownArgs& args, StreamHandle stream,
                      bool overlap_previous) {
  down(device::Output::kScratch, problem, plan, experts, args, stream, overlap_previous);
}
void launch_tile_down(const ExpertProblem& problem, const ExpertTilesPlan& plan,
                      const ExpertTable& experts, const TileDownArgs& args, StreamHandle stream,
                      bool overlap_previous) {
  down(device::Output::kScratch, problem, plan, experts, args, stream, overlap_previous);
}
void launch_tile_down_compact(const ExpertProblem& problem, const ExpertTilesPlan& plan,
                              const ExpertEntries& experts, const TileDownArgs& args,
                              StreamHandle stream, bool overlap_previous) {
  down(device::Output::kRaw, problem, plan, experts, args, stream, overlap_previous);
}
void launch_tile_down_compact(const ExpertProblem& problem, const ExpertTilesPlan& plan,
                              const ExpertTable& experts, const TileDownArgs& args,
                              StreamHandle stream, bool overlap_previous) {
  down(device::Output::kRaw, problem, plan, experts, args, stream, overlap_previous);
}

}  // namespace sluice
