// The launchers of the many-token kernels: which matrix, which arithmetic, which output.
#include <string>

#include "kernels/expert_tiles.cuh"

namespace sluice {
namespace {

template <class List>
void launch_checked(const ExpertProblem& problem, const ExpertTilesPlan& plan,
                    const device::MatrixLaunch<List>& matrix, std::int32_t min_tokens) {
  const bool paired = device::is_paired(matrix.matrix);
  require<InternalError>(matrix.list.count <= plan.list_capacity && paired == plan.paired, [&] {
    return std::string(matrix.name) + ": got " + std::to_string(matrix.list.count) + " experts, " +
           (paired ? "paired" : "single") +
           " rows, expected what the plan was made for: " + plan.text();
  });
  require<InternalError>(min_tokens >= 1, [&] {
    return std::string(matrix.name) + ": got min_tokens " + std::to_string(min_tokens) +
           ", expected 1 or more";
  });
  device::check_rows(matrix);
  if (matrix.list.count == 0) return;
  if (problem.activations == DType::kF32) {
    device::launch_tiles_fma(problem.weights, plan, matrix, min_tokens);
  } else {
    device::launch_tiles_mma(problem.weights, plan, matrix, min_tokens);
  }
}

template <class List>
void down(const char* name, device::Output output, const ExpertProblem& problem,
          const ExpertTilesPlan& plan, const List& experts, const TileDownArgs& args,
          StreamHandle stream, bool overlap_previous) {
  launch_checked<List>(problem, plan,
                       {.name = name,
                        .list = experts,
                        .routed = args.routed,
                        .matrix = device::plain_w2(problem, output, args.out),
                        .input = args.h,
                        .stream = stream,
                        .overlap_previous = overlap_previous},
                       args.min_tokens);
}

}  // namespace

template <ExpertList List>
void launch_tile_gate_up(const ExpertProblem& problem, const ExpertTilesPlan& plan,
                         const List& experts, const TileGateUpArgs& args, StreamHandle stream,
                         bool overlap_previous) {
  launch_checked<List>(problem, plan,
                       {.name = "tile_gate_up",
                        .list = experts,
                        .routed = args.routed,
                        .matrix = device::gated_w13(problem, args.out),
                        .input = args.hidden,
                        .stream = stream,
                        .overlap_previous = overlap_previous},
                       args.min_tokens);
}

template <ExpertList List>
void launch_tile_gate_up_raw(const ExpertProblem& problem, std::int64_t w13_rows,
                             const ExpertTilesPlan& plan, const List& experts,
                             const TileGateUpArgs& args, StreamHandle stream,
                             bool overlap_previous) {
  launch_checked<List>(problem, plan,
                       {.name = "tile_gate_up_raw",
                        .list = experts,
                        .routed = args.routed,
                        .matrix = device::raw_w13(problem, w13_rows, args.out),
                        .input = args.hidden,
                        .stream = stream,
                        .overlap_previous = overlap_previous},
                       args.min_tokens);
}

template <ExpertList List>
void launch_tile_down(const ExpertProblem& problem, const ExpertTilesPlan& plan,
                      const List& experts, const TileDownArgs& args, StreamHandle stream,
                      bool overlap_previous) {
  down("tile_down", device::Output::kScratch, problem, plan, experts, args, stream,
       overlap_previous);
}

template <ExpertList List>
void launch_tile_down_compact(const ExpertProblem& problem, const ExpertTilesPlan& plan,
                              const List& experts, const TileDownArgs& args, StreamHandle stream,
                              bool overlap_previous) {
  down("tile_down_compact", device::Output::kRaw, problem, plan, experts, args, stream,
       overlap_previous);
}

template void launch_tile_gate_up(const ExpertProblem&, const ExpertTilesPlan&,
                                  const ExpertEntries&, const TileGateUpArgs&, StreamHandle, bool);
template void launch_tile_gate_up(const ExpertProblem&, const ExpertTilesPlan&, const ExpertTable&,
                                  const TileGateUpArgs&, StreamHandle, bool);
template void launch_tile_gate_up_raw(const ExpertProblem&, std::int64_t, const ExpertTilesPlan&,
                                      const ExpertEntries&, const TileGateUpArgs&, StreamHandle,
                                      bool);
template void launch_tile_gate_up_raw(const ExpertProblem&, std::int64_t, const ExpertTilesPlan&,
                                      const ExpertTable&, const TileGateUpArgs&, StreamHandle,
                                      bool);
template void launch_tile_down(const ExpertProblem&, const ExpertTilesPlan&, const ExpertEntries&,
                               const TileDownArgs&, StreamHandle, bool);
template void launch_tile_down(const ExpertProblem&, const ExpertTilesPlan&, const ExpertTable&,
                               const TileDownArgs&, StreamHandle, bool);
template void launch_tile_down_compact(const ExpertProblem&, const ExpertTilesPlan&,
                                       const ExpertEntries&, const TileDownArgs&, StreamHandle,
                                       bool);
template void launch_tile_down_compact(const ExpertProblem&, const ExpertTilesPlan&,
                                       const ExpertTable&, const TileDownArgs&, StreamHandle, bool);

}  // namespace sluice
