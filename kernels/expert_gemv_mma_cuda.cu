// The decode pair where weights and activations are of one half type: tensor cores.
#include "kernels/expert_gemv.cuh"

namespace sluice::device {

template <class List>
void launch_gemv_mma(DType dtype, const char* name, const ExpertGemvPlan& plan, const List& list,
                     const RoutedRows& routed, const ExpertMatrix& matrix, bool paired,
                     const void* input, StreamHandle stream, bool overlap_previous) {
  if (dtype == DType::kBF16) {
    launch_gemv<BFloat16, BFloat16, MmaSums<BFloat16>>(name, plan, list, routed, matrix, paired,
                                                       input, stream, overlap_previous);
  } else {
    launch_gemv<Float16, Float16, MmaSums<Float16>>(name, plan, list, routed, matrix, paired, input,
                                                    stream, overlap_previous);
  }
}

template void launch_gemv_mma(DType, const char*, const ExpertGemvPlan&, const ExpertEntries&,
                              const RoutedRows&, const ExpertMatrix&, bool, const void*,
                              StreamHandle, bool);
template void launch_gemv_mma(DType, const char*, const ExpertGemvPlan&, const ExpertTable&,
                              const RoutedRows&, const ExpertMatrix&, bool, const void*,
                              StreamHandle, bool);

}  // namespace sluice::device
