// The decode pair where weights and activations are of one half type: tensor cores.
#include "kernels/expert_gemv.cuh"

namespace sluice::device {

/// A lane's share of one warp's sums, on tensor cores: weights are the 16-row operand, tokens its 8
/// columns, twice. Lane 4g + t holds rows g, g + 8 of tokens 2t, 2t + 1.
template <class T>
struct MmaSums {
  using Weight = T;
  using Activation = T;
  ptx::Accumulators c[2] = {};

  /// Adds the lane's 8 columns of both rows. `x` is column 0 of this step in shared memory.
  __device__ __forceinline__ void add(const uint4& a, const uint4& b, const T* x, int pitch,
                                      int tokens, int lane) {
    const int g = lane / 4;
    const int column = 8 * (lane % 4);
    // The k index of an mma is only a label: words 0 and 1 of every lane make the first, 2 and 3
    // the second, in both operands. Lanes of absent tokens read a real one; nobody looks at theirs.
    const ptx::FragmentA first{{a.x, b.x, a.y, b.y}};
    const ptx::FragmentA second{{a.z, b.z, a.w, b.w}};
    const uint4 low = *reinterpret_cast<const uint4*>(x + (g < tokens ? g : 0) * pitch + column);
    multiply_add<T>(c[0], first, ptx::FragmentB{{low.x, low.y}});
    multiply_add<T>(c[0], second, ptx::FragmentB{{low.z, low.w}});
    if (tokens <= 8) return;
    const int token = g + 8 < tokens ? g + 8 : 0;
    const uint4 high = *reinterpret_cast<const uint4*>(x + token * pitch + column);
    multiply_add<T>(c[1], first, ptx::FragmentB{{high.x, high.y}});
    multiply_add<T>(c[1], second, ptx::FragmentB{{high.z, high.w}});
  }

  __device__ __forceinline__ void store(float* partial, int tokens, int lane) const {
    const int g = lane / 4;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int token = 8 * half + 2 * (lane % 4) + i % 2;
        if (token < tokens) partial[token * kPartialPitch + g + 8 * (i / 2)] = c[half].r[i];
      }
    }
  }
};

template <class List>
void launch_gemv_mma(DType dtype, const ExpertGemvPlan& plan, const MatrixLaunch<List>& matrix) {
  dispatch_half(
      dtype, [&](auto tag) { launch_gemv<MmaSums<typename decltype(tag)::type>>(plan, matrix); });
}

template void launch_gemv_mma(DType, const ExpertGemvPlan&, const MatrixLaunch<ExpertEntries>&);
template void launch_gemv_mma(DType, const ExpertGemvPlan&, const MatrixLaunch<ExpertTable>&);

}  // namespace sluice::device
