// The many-token kernels where weights and activations are of one half type: tensor cores.
#include "kernels/expert_tiles.cuh"

namespace sluice::device {

template <class List>
void launch_tiles_mma(DType dtype, const char* name, const ExpertTilesPlan& plan, const List& list,
                      const RoutedRows& routed, const ExpertMatrix& matrix, std::int32_t min_tokens,
                      const void* input, StreamHandle stream, bool overlap_previous) {
  if (dtype == DType::kBF16) {
    launch_tiles<MmaTile<BFloat16>>(name, plan, list, routed, matrix, min_tokens, input, stream,
                                    overlap_previous);
  } else {
    launch_tiles<MmaTile<Float16>>(name, plan, list, routed, matrix, min_tokens, input, stream,
                                   overlap_previous);
  }
}

template void launch_tiles_mma(DType, const char*, const ExpertTilesPlan&, const ExpertEntries&,
                               const RoutedRows&, const ExpertMatrix&, std::int32_t, const void*,
                               StreamHandle, bool);
template void launch_tiles_mma(DType, const char*, const ExpertTilesPlan&, const ExpertTable&,
                               const RoutedRows&, const ExpertMatrix&, std::int32_t, const void*,
                               StreamHandle, bool);

}  // namespace sluice::device
