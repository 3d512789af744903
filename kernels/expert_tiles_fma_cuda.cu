// The many-token kernels for fp32 activations, over weights of any type: FMA.
#include "kernels/expert_tiles.cuh"

namespace sluice::device {

template <class List>
void launch_tiles_fma(DType weights, const char* name, const ExpertTilesPlan& plan,
                      const List& list, const RoutedRows& routed, const ExpertMatrix& matrix,
                      std::int32_t min_tokens, const void* input, StreamHandle stream,
                      bool overlap_previous) {
  dispatch_dtype(weights, [&](auto tag) {
    using W = typename decltype(tag)::type;
    launch_tiles<FmaTile<W>>(name, plan, list, routed, matrix, min_tokens, input, stream,
                             overlap_previous);
  });
}

template void launch_tiles_fma(DType, const char*, const ExpertTilesPlan&, const ExpertEntries&,
                               const RoutedRows&, const ExpertMatrix&, std::int32_t, const void*,
                               StreamHandle, bool);
template void launch_tiles_fma(DType, const char*, const ExpertTilesPlan&, const ExpertTable&,
                               const RoutedRows&, const ExpertMatrix&, std::int32_t, const void*,
                               StreamHandle, bool);

}  // namespace sluice::device
