#include "tests/emulation/planted/streams.h"

#include "kernels/launch.h"
#include "kernels/ptx.h"

namespace planted {
namespace {

namespace ptx = sluice::ptx;
using sluice::launch;
using sluice::LaunchShape;

constexpr unsigned kThreads = 64;

// Blocks stride over the elements, so that a grid is several batches.
__global__ void scale_kernel(const __grid_constant__ ScaleParameters p) {
  const int stride = static_cast<int>(gridDim.x * blockDim.x);
  for (int i = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x); i < p.count; i += stride) {
    p.out[i] = p.weights[i] * p.in[i];
  }
}

template <bool kWaits>
__global__ void add_one_kernel(const __grid_constant__ AddOneParameters p) {
  if constexpr (kWaits) ptx::grid_dependency_wait();
  const int stride = static_cast<int>(gridDim.x * blockDim.x);
  for (int i = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x); i < p.count; i += stride) {
    p.out[i] = p.in[i] + 1.0f;
  }
}

__global__ void poll_kernel(const __grid_constant__ PollParameters p) {
  while (ptx::load_acquire_sys(p.flag) == 0) {
  }
  p.out[0] = 1.0f;
}

__global__ void raise_kernel(std::uint32_t* flag, std::uint32_t value) {
  ptx::store_release_sys(flag, value);
}

__global__ void through_shared_kernel(float* out, int count) {
  SLUICE_DYNAMIC_SHARED(bytes);
  float* const ones = reinterpret_cast<float*>(bytes);
  for (int i = static_cast<int>(threadIdx.x); i < count; i += static_cast<int>(blockDim.x)) {
    ones[i] = 1.0f;
  }
  __syncthreads();
  if (threadIdx.x != 0) return;
  float sum = 0.0f;
  for (int i = 0; i < count; ++i) sum += ones[i];
  out[0] = sum;
}

__global__ void empty_kernel(int /*unused*/) {}

}  // namespace

cudaError_t launch_scale(const ScaleParameters& parameters, cudaStream_t stream) {
  const LaunchShape shape = {.grid = {3}, .block = {kThreads}, .stream = stream};
  return launch("scale", shape, scale_kernel, parameters);
}

cudaError_t launch_add_one(const AddOneParameters& parameters, bool waits, cudaStream_t stream,
                           int num_blocks) {
  const LaunchShape shape = {.grid = {static_cast<unsigned>(num_blocks)},
                             .block = {kThreads},
                             .stream = stream,
                             .overlap_previous = true};
  return waits ? launch("add_one", shape, add_one_kernel<true>, parameters)
               : launch("add_one", shape, add_one_kernel<false>, parameters);
}

cudaError_t launch_poll(const PollParameters& parameters, cudaStream_t stream) {
  const LaunchShape shape = {.grid = {1}, .block = {1}, .stream = stream};
  return launch("poll", shape, poll_kernel, parameters);
}

cudaError_t launch_raise(std::uint32_t* flag, std::uint32_t value, cudaStream_t stream) {
  const LaunchShape shape = {.grid = {1}, .block = {1}, .stream = stream};
  return launch("raise", shape, raise_kernel, flag, value);
}

cudaError_t launch_through_shared(float* out, std::size_t shared_bytes, cudaStream_t stream) {
  const LaunchShape shape = {
      .grid = {1}, .block = {kThreads}, .shared_bytes = shared_bytes, .stream = stream};
  return launch("through_shared", shape, through_shared_kernel, out,
                static_cast<int>(shared_bytes / sizeof(float)));
}

cudaError_t launch_empty(dim3 grid, dim3 block, cudaStream_t stream) {
  const LaunchShape shape = {.grid = grid, .block = block, .stream = stream};
  return launch("empty", shape, empty_kernel, 0);
}

}  // namespace planted
