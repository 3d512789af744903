// The launchers of the decode pair: which matrix, which arithmetic.
#include <string>

#include "kernels/expert_gemv.cuh"

namespace sluice {
namespace {

template <class List>
void launch_checked(const ExpertProblem& problem, const ExpertGemvPlan& plan,
                    const device::MatrixLaunch<List>& matrix) {
  require<InternalError>(matrix.list.count <= plan.list_capacity, [&] {
    return std::string(matrix.name) + ": got " + std::to_string(matrix.list.count) +
           " experts, expected at most the plan's " + std::to_string(plan.list_capacity);
  });
  device::check_rows(matrix);
  if (matrix.list.count == 0) return;
  if (problem.activations == DType::kF32) {
    device::launch_gemv_fma(problem.weights, plan, matrix);
  } else {
    device::launch_gemv_mma(problem.weights, plan, matrix);
  }
}

}  // namespace

template <ExpertList List>
void launch_expert_gate_up(const ExpertProblem& problem, const ExpertGemvPlan& plan,
                           const List& experts, const ExpertGateUpArgs& args, StreamHandle stream,
                           bool overlap_previous) {
  launch_checked<List>(problem, plan,
                       {.name = "expert_gate_up",
                        .list = experts,
                        .routed = args.routed,
                        .matrix = device::gated_w13(problem, args.h),
                        .input = args.hidden,
                        .stream = stream,
                        .overlap_previous = overlap_previous});
}

template <ExpertList List>
void launch_expert_down(const ExpertProblem& problem, const ExpertGemvPlan& plan,
                        const List& experts, const ExpertDownArgs& args, StreamHandle stream,
                        bool overlap_previous) {
  launch_checked<List>(problem, plan,
                       {.name = "expert_down",
                        .list = experts,
                        .routed = args.routed,
                        .matrix = device::plain_w2(problem, device::Output::kScratch, args.scratch),
                        .input = args.h,
                        .stream = stream,
                        .overlap_previous = overlap_previous});
}

template void launch_expert_gate_up(const ExpertProblem&, const ExpertGemvPlan&,
                                    const ExpertEntries&, const ExpertGateUpArgs&, StreamHandle,
                                    bool);
template void launch_expert_gate_up(const ExpertProblem&, const ExpertGemvPlan&, const ExpertTable&,
                                    const ExpertGateUpArgs&, StreamHandle, bool);
template void launch_expert_down(const ExpertProblem&, const ExpertGemvPlan&, const ExpertEntries&,
                                 const ExpertDownArgs&, StreamHandle, bool);
template void launch_expert_down(const ExpertProblem&, const ExpertGemvPlan&, const ExpertTable&,
                                 const ExpertDownArgs&, StreamHandle, bool);

}  // namespace sluice
