#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>

// Small kernels for the tests of the fake runtime: each does one thing that streams can get wrong.
namespace planted {

/// out[i] = weights[i] * in[i]; what an expert does to a token.
struct ScaleParameters {
  const float* weights;
  const float* in;
  float* out;
  int count;
};
[[nodiscard]] cudaError_t launch_scale(const ScaleParameters& parameters, cudaStream_t stream);

/// out[i] = in[i] + 1 as a dependent launch, which may begin before what writes `in` has ended.
struct AddOneParameters {
  const float* in;
  float* out;
  int count;
};
/// `waits`: with its griddepcontrol.wait; false is the planted bug.
[[nodiscard]] cudaError_t launch_add_one(const AddOneParameters& parameters, bool waits,
                                         cudaStream_t stream, int num_blocks = 2);

/// Polls `flag` until the host or another stream makes it nonzero, then out[0] = 1.
struct PollParameters {
  const std::uint32_t* flag;
  float* out;
};
[[nodiscard]] cudaError_t launch_poll(const PollParameters& parameters, cudaStream_t stream);

/// *flag = value, released.
[[nodiscard]] cudaError_t launch_raise(std::uint32_t* flag, std::uint32_t value,
                                       cudaStream_t stream);

/// out[0] = the sum of `shared_bytes` / 4 ones that went through dynamic shared memory.
[[nodiscard]] cudaError_t launch_through_shared(float* out, std::size_t shared_bytes,
                                                cudaStream_t stream);

/// A launch with a shape that may be illegal.
[[nodiscard]] cudaError_t launch_empty(dim3 grid, dim3 block, cudaStream_t stream);

}  // namespace planted
