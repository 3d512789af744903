#pragma once

#include <cuda_bf16.h>

#include "tests/emulation/simt.h"

namespace simt::testing {

struct Where {
  uint3 thread, block;
  dim3 block_dim, grid_dim;
};
__global__ void positions_kernel(Where* out);
__global__ void reduce_kernel(const int* in, int* out);
__global__ void shift_kernel(const int* in, int* out);
__global__ void exit_early_kernel(int* out, int remaining);
__global__ void shuffle_kernel(int kind, int argument, int width, int* out);
__global__ void half_warps_kernel(int* out);
__global__ void vote_kernel(int lanes_below, unsigned* out);
__global__ void atomics_kernel(unsigned* out);
__global__ void arrival_kernel(unsigned* slots);
struct MmaArgs {
  const std::uint32_t* a;
  const std::uint32_t* b;
  const float* c;
  float* d;
  bool fp16;
};
__global__ void mma_kernel(MmaArgs args);
__global__ void ldmatrix_kernel(const std::uint16_t* in, std::uint32_t* out, bool transpose);
__global__ void cp_async_kernel(const int* in, int* out, int from_bytes);
__global__ void two_stages_kernel(const int* in, int* out, int stages);
__global__ void dependent_kernel(const int* previous, int* prologue, int* out);
__global__ void answer_kernel(std::uint32_t* posted, const std::uint32_t* served, int* out);
__global__ void blocks_in_turn_kernel(std::uint32_t* turns, int* out);
__global__ void constants_kernel(int* out);
__global__ void narrow_store_kernel(const float* in, __nv_bfloat16* out);
__global__ void mixed_bytes_kernel(unsigned char* out);
__global__ void last_block_kernel(float* partials, unsigned* counter, float* out);
__global__ void reversed_kernel(const int* in, int* out);
__global__ void half_words_kernel(std::uint16_t* halves, std::uint32_t* flag, int* out);
__global__ void escaping_stores_kernel(__nv_bfloat16* memory, float* out);
__global__ void rounds_kernel(unsigned* slots);
__global__ void touch_kernel(int* p, long offset, bool write);

}  // namespace simt::testing
