#include <string>

#include "kernels/combine_gpu.h"
#include "kernels/elements.cuh"
#include "kernels/launch.h"
#include "kernels/launch_check.h"

namespace sluice {
namespace {

constexpr int kThreads = 256;
constexpr int kColumnsPerThread = 4;
constexpr int kColumnsPerBlock = kThreads * kColumnsPerThread;

/// Four neighbouring values to four of another type, in one store.
template <class T>
__device__ __forceinline__ void store_four(T* to, const float (&values)[4]) {
  if constexpr (sizeof(T) == 4) {
    *reinterpret_cast<float4*>(to) = make_float4(values[0], values[1], values[2], values[3]);
  } else {
    std::uint32_t bits[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) bits[i] = device::narrow<T>(values[i]).bits;
    *reinterpret_cast<uint2*>(to) = make_uint2(bits[0] | bits[1] << 16, bits[2] | bits[3] << 16);
  }
}

template <class T>
__device__ __forceinline__ float4 load_four(const T* from) {
  if constexpr (sizeof(T) == 4) {
    return *reinterpret_cast<const float4*>(from);
  } else {
    const uint2 words = *reinterpret_cast<const uint2*>(from);
    return make_float4(device::widen(T{static_cast<std::uint16_t>(words.x)}),
                       device::widen(T{static_cast<std::uint16_t>(words.x >> 16)}),
                       device::widen(T{static_cast<std::uint16_t>(words.y)}),
                       device::widen(T{static_cast<std::uint16_t>(words.y >> 16)}));
  }
}

struct CombineParams {
  CombineArgs args;
  std::int32_t top_k = 0;
  std::int32_t hidden = 0;
  std::int32_t num_experts = 0;
};

// The weighted sum of a token's rows.
//
// Mapping:  blockIdx.x = token, (blockIdx.y, threadIdx.x) = four neighbouring columns.
// Traffic:  4 · K · H bytes per token read, 16 bytes per load, mostly from L2.
// Numerics: fused multiply-add in k order from zero, one rounding: combine.h's bits.
// Requires: H % 8 == 0, rows 16-byte aligned.
template <class Weight, class Out>
__global__ void __launch_bounds__(kThreads)
    combine_kernel(const __grid_constant__ CombineParams p) {
  ptx::grid_dependency_wait();
  ptx::grid_launch_dependents();
  const std::int64_t token = blockIdx.x;
  const int column =
      (static_cast<int>(blockIdx.y) * kThreads + static_cast<int>(threadIdx.x)) * kColumnsPerThread;
  if (column >= p.hidden) return;
  float sum[4] = {};
  for (int k = 0; k < p.top_k; ++k) {
    const std::int64_t entry = token * p.top_k + k;
    const std::int64_t id = p.args.ids[entry];
    const float weight = device::widen(static_cast<const Weight*>(p.args.weights)[entry]);
    if (id < 0 || id >= p.num_experts || weight == 0.0f) continue;
    const float4 row = load_four(p.args.scratch + entry * p.hidden + column);
    sum[0] = __fmaf_rn(weight, row.x, sum[0]);
    sum[1] = __fmaf_rn(weight, row.y, sum[1]);
    sum[2] = __fmaf_rn(weight, row.z, sum[2]);
    sum[3] = __fmaf_rn(weight, row.w, sum[3]);
  }
  store_four(static_cast<Out*>(p.args.out) + token * p.hidden + column, sum);
}

struct ScatterParams {
  ScatterArgs args;
  std::int64_t first = 0;
  std::int32_t hidden = 0;
  std::int32_t num_experts = 0;
};

// Rows by routed position to rows by entry. Mapping as above, with a position for a token.
template <class T>
__global__ void __launch_bounds__(kThreads)
    scatter_rows_kernel(const __grid_constant__ ScatterParams p) {
  ptx::grid_dependency_wait();
  ptx::grid_launch_dependents();
  const std::int64_t position = p.first + blockIdx.x;
  const int column =
      (static_cast<int>(blockIdx.y) * kThreads + static_cast<int>(threadIdx.x)) * kColumnsPerThread;
  if (column >= p.hidden || position >= p.args.offsets[p.num_experts]) return;
  const float4 v = load_four(static_cast<const T*>(p.args.compact) + position * p.hidden + column);
  const std::int64_t entry = p.args.rows[position];
  *reinterpret_cast<float4*>(p.args.scratch + entry * p.hidden + column) = v;
}

void check_hidden(const char* kernel, std::int64_t hidden) {
  require<ConfigError>(hidden > 0 && hidden % 8 == 0, [&] {
    return std::string(kernel) + ": got a hidden width of " + std::to_string(hidden) +
           ", expected a positive multiple of 8; run this model on the CPU";
  });
}

LaunchShape row_shape(std::int64_t rows, std::int64_t hidden, StreamHandle stream,
                      bool overlap_previous) {
  return {.grid = dim3(static_cast<unsigned>(rows),
                       static_cast<unsigned>((hidden + kColumnsPerBlock - 1) / kColumnsPerBlock)),
          .block = dim3(kThreads),
          .stream = to_cuda(stream),
          .overlap_previous = overlap_previous};
}

}  // namespace

void launch_combine(const CombineProblem& problem, const CombineArgs& args, StreamHandle stream,
                    bool overlap_previous) {
  check_hidden("combine", problem.hidden);
  check_aligned("combine", "scratch", args.scratch);
  check_aligned("combine", "the output rows", args.out);
  if (problem.num_tokens == 0) return;
  const CombineParams params{.args = args,
                             .top_k = static_cast<std::int32_t>(problem.top_k),
                             .hidden = static_cast<std::int32_t>(problem.hidden),
                             .num_experts = problem.num_experts};
  const LaunchShape shape = row_shape(problem.num_tokens, problem.hidden, stream, overlap_previous);
  dispatch_dtype(problem.weights, [&](auto weight_tag) {
    using Weight = typename decltype(weight_tag)::type;
    dispatch_dtype(problem.out, [&](auto out_tag) {
      using Out = typename decltype(out_tag)::type;
      check_launch("combine", launch("combine", shape, combine_kernel<Weight, Out>, params));
    });
  });
}

void launch_scatter_rows(const ScatterProblem& problem, const ScatterArgs& args,
                         StreamHandle stream, bool overlap_previous) {
  check_hidden("scatter_rows", problem.hidden);
  check_aligned("scatter_rows", "the compact rows", args.compact);
  check_aligned("scatter_rows", "scratch", args.scratch);
  if (problem.num_rows == 0) return;
  const ScatterParams params{.args = args,
                             .first = problem.first,
                             .hidden = static_cast<std::int32_t>(problem.hidden),
                             .num_experts = problem.num_experts};
  const LaunchShape shape = row_shape(problem.num_rows, problem.hidden, stream, overlap_previous);
  dispatch_dtype(problem.compact, [&](auto tag) {
    using T = typename decltype(tag)::type;
    check_launch("scatter_rows", launch("scatter_rows", shape, scatter_rows_kernel<T>, params));
  });
}

}  // namespace sluice
