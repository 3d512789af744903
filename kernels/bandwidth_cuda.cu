#include <string>

#include "kernels/bandwidth_gpu.h"
#include "kernels/launch.h"
#include "kernels/launch_check.h"
#include "kernels/ptx.h"

namespace sluice {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int kBlocksPerMultiprocessor = 4;
// Loads that a thread has in flight: 4 blocks of 256 threads and these hold 64 KiB per
// multiprocessor, what the decode kernels have.
constexpr int kDepth = 4;

struct ReadParams {
  const void* data = nullptr;
  std::int64_t num_loads = 0;
  std::uint32_t* sums = nullptr;
};

// A read-only pass over memory.
//
// Mapping:  persistent blocks; a block takes kDepth · 256 neighbouring loads per turn, a warp 512
//           neighbouring bytes per load.
// Traffic:  every byte once, 16 bytes per load.
// Numerics: sums of 32-bit words modulo 2^32: any order gives the same.
// Requires: 16-byte aligned data of a multiple of 16 bytes.
__global__ void __launch_bounds__(kThreads)
    read_bandwidth_kernel(const __grid_constant__ ReadParams p) {
  SLUICE_SHARED(std::uint32_t, warp_sums, [kWarps]);
  const int thread = static_cast<int>(threadIdx.x);
  const uint4* const data = static_cast<const uint4*>(p.data);
  constexpr std::int64_t kTurn = kDepth * kThreads;
  std::uint32_t sum = 0;
  for (std::int64_t turn = blockIdx.x * kTurn; turn < p.num_loads; turn += gridDim.x * kTurn) {
    uint4 loads[kDepth];
#pragma unroll
    for (int i = 0; i < kDepth; ++i) {
      const std::int64_t at = turn + i * kThreads + thread;
      loads[i] = at < p.num_loads ? ptx::load_stream(data + at) : uint4{0, 0, 0, 0};
    }
#pragma unroll
    for (int i = 0; i < kDepth; ++i) sum += loads[i].x + loads[i].y + loads[i].z + loads[i].w;
  }
#pragma unroll
  for (int step = 16; step > 0; step /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, step);
  if (thread % 32 == 0) warp_sums[thread / 32] = sum;
  __syncthreads();
  if (thread != 0) return;
  for (int w = 1; w < kWarps; ++w) sum += warp_sums[w];
  p.sums[blockIdx.x] = sum;
}

__global__ void nothing_kernel() {}

}  // namespace

int read_bandwidth_blocks(const GpuTraits& gpu) {
  return kBlocksPerMultiprocessor * gpu.num_multiprocessors;
}

void launch_read_bandwidth(const void* data, std::size_t bytes, std::uint32_t* sums,
                           const GpuTraits& gpu, StreamHandle stream) {
  check_aligned("read_bandwidth", "data", data);
  require<ConfigError>(bytes % 16 == 0, [&] {
    return "read_bandwidth: got " + std::to_string(bytes) + " bytes, expected a multiple of 16";
  });
  const ReadParams params{
      .data = data, .num_loads = static_cast<std::int64_t>(bytes / 16), .sums = sums};
  const LaunchShape shape{.grid = dim3(static_cast<unsigned>(read_bandwidth_blocks(gpu))),
                          .block = dim3(kThreads),
                          .stream = to_cuda(stream)};
  check_launch("read_bandwidth", launch("read_bandwidth", shape, read_bandwidth_kernel, params));
}

void launch_nothing(StreamHandle stream) {
  const LaunchShape shape{.grid = dim3(1), .block = dim3(1), .stream = to_cuda(stream)};
  check_launch("nothing", launch("nothing", shape, nothing_kernel));
}

}  // namespace sluice
