// The decode pair for fp32 activations, over weights of any type: FMA.
#include "kernels/expert_gemv.cuh"

namespace sluice::device {

template <class List>
void launch_gemv_fma(DType weights, const char* name, const ExpertGemvPlan& plan, const List& list,
                     const RoutedRows& routed, const ExpertMatrix& matrix, bool paired,
                     const void* input, StreamHandle stream, bool overlap_previous) {
  dispatch_dtype(weights, [&](auto tag) {
    using W = typename decltype(tag)::type;
    launch_gemv<W, float, FmaSums<W>>(name, plan, list, routed, matrix, paired, input, stream,
                                      overlap_previous);
  });
}

template void launch_gemv_fma(DType, const char*, const ExpertGemvPlan&, const ExpertEntries&,
                              const RoutedRows&, const ExpertMatrix&, bool, const void*,
                              StreamHandle, bool);
template void launch_gemv_fma(DType, const char*, const ExpertGemvPlan&, const ExpertTable&,
                              const RoutedRows&, const ExpertMatrix&, bool, const void*,
                              StreamHandle, bool);

}  // namespace sluice::device
