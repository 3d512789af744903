// The launchers of the decode pair: which matrix, which arithmetic.
#include <string>

#include "kernels/expert_gemv.cuh"

namespace sluice {
namespace {

template <class List>
void launch_pair(const char* name, const ExpertProblem& problem, const ExpertGemvPlan& plan,
                 const List& list, const RoutedRows& routed, const device::ExpertMatrix& matrix,
                 bool paired, const void* input, StreamHandle stream, bool overlap_previous) {
  require<InternalError>(list.count <= plan.list_capacity, [&] {
    return std::string(name) + ": got " + std::to_string(list.count) +
           " experts, expected at most the plan's " + std::to_string(plan.list_capacity);
  });
  check_aligned(name, "the input rows", input);
  check_aligned(name, "the output rows", matrix.out);
  if (list.count == 0) return;
  if (problem.activations == DType::kF32) {
    device::launch_gemv_fma(problem.weights, name, plan, list, routed, matrix, paired, input,
                            stream, overlap_previous);
  } else {
    device::launch_gemv_mma(problem.weights, name, plan, list, routed, matrix, paired, input,
                            stream, overlap_previous);
  }
}

template <class List>
void gate_up(const ExpertProblem& problem, const ExpertGemvPlan& plan, const List& experts,
             const ExpertGateUpArgs& args, StreamHandle stream, bool overlap_previous) {
  const auto intermediate = static_cast<std::int32_t>(problem.intermediate);
  launch_pair("expert_gate_up", problem, plan, experts, args.routed,
              {.is_w2 = false,
               .interleaved = problem.gate.interleaved,
               .channels = intermediate,
               .columns = static_cast<std::int32_t>(problem.hidden),
               .out_pitch = intermediate,
               .output = device::Output::kGate,
               .gate = problem.gate,
               .out = args.h},
              is_gated(problem.gate.kind), args.hidden, stream, overlap_previous);
}

template <class List>
void down(const ExpertProblem& problem, const ExpertGemvPlan& plan, const List& experts,
          const ExpertDownArgs& args, StreamHandle stream, bool overlap_previous) {
  const auto hidden = static_cast<std::int32_t>(problem.hidden);
  launch_pair("expert_down", problem, plan, experts, args.routed,
              {.is_w2 = true,
               .channels = hidden,
               .columns = static_cast<std::int32_t>(problem.intermediate),
               .out_pitch = hidden,
               .output = device::Output::kScratch,
               .out = args.scratch},
              false, args.h, stream, overlap_previous);
}

}  // namespace

void launch_expert_gate_up(const ExpertProblem& problem, const ExpertGemvPlan& plan,
                           const ExpertEntries& experts, const ExpertGateUpArgs& args,
                           StreamHandle stream, bool overlap_previous) {
  gate_up(problem, plan, experts, args, stream, overlap_previous);
}
void launch_expert_gate_up(const ExpertProblem& problem, const ExpertGemvPlan& plan,
                           const ExpertTable& experts, const ExpertGateUpArgs& args,
                           StreamHandle stream, bool overlap_previous) {
  gate_up(problem, plan, experts, args, stream, overlap_previous);
}
void launch_expert_down(const ExpertProblem& problem, const ExpertGemvPlan& plan,
                        const ExpertEntries& experts, const ExpertDownArgs& args,
                        StreamHandle stream, bool overlap_previous) {
  down(problem, plan, experts, args, stream, overlap_previous);
}
void launch_expert_down(const ExpertProblem& problem, const ExpertGemvPlan& plan,
                        const ExpertTable& experts, const ExpertDownArgs& args, StreamHandle stream,
                        bool overlap_previous) {
  down(problem, plan, experts, args, stream, overlap_previous);
}

}  // namespace sluice
