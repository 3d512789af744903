#include "tests/emulation/simt_test_kernels.h"

#include "kernels/ptx.h"

namespace simt::testing {

namespace ptx = sluice::ptx;

__global__ void positions_kernel(Where* out) {
  const unsigned block = blockIdx.x + gridDim.x * (blockIdx.y + gridDim.y * blockIdx.z);
  const unsigned thread = threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z);
  out[block * blockDim.x * blockDim.y * blockDim.z + thread] = {threadIdx, blockIdx, blockDim,
                                                                gridDim};
}

__global__ void reduce_kernel(const int* in, int* out) {
  const int value = in[threadIdx.x];
  const int count = __syncthreads_count(value);
  const int all = __syncthreads_and(value);
  const int any = __syncthreads_or(value);
  out[threadIdx.x] = count * 4 + all * 2 + any;
}

// Every thread gets the value of the next, through shared memory, several times over.
__global__ void shift_kernel(const int* in, int* out) {
  SLUICE_SHARED(int, ring, [256]);
  int value = in[threadIdx.x];
  for (int step = 0; step < 5; ++step) {
    ring[threadIdx.x] = value;
    __syncthreads();
    value = ring[(threadIdx.x + 1) % blockDim.x];
    __syncthreads();
  }
  out[threadIdx.x] = value;
}

__global__ void exit_early_kernel(int* out, int remaining) {
  if (static_cast<int>(threadIdx.x) >= remaining) return;
  out[threadIdx.x] = __syncthreads_count(1);
}

__global__ void shuffle_kernel(int kind, int argument, int width, int* out) {
  const int value = 100 + static_cast<int>(threadIdx.x);
  int result = 0;
  switch (kind) {
    case 0:
      result = __shfl_sync(~0u, value, argument, width);
      break;
    case 1:
      result = __shfl_up_sync(~0u, value, argument, width);
      break;
    case 2:
      result = __shfl_down_sync(~0u, value, argument, width);
      break;
    case 3:
      result = __shfl_xor_sync(~0u, value, argument, width);
      break;
    default:
      break;
  }
  out[threadIdx.x] = result;
}

// Two halves of a warp that synchronise apart, in different places.
__global__ void half_warps_kernel(int* out) {
  const int lane = static_cast<int>(threadIdx.x);
  if (lane < 16) {
    out[lane] = __shfl_xor_sync(0x0000FFFFu, lane, 1);
  } else {
    out[lane] = __shfl_xor_sync(0xFFFF0000u, lane, 2);
  }
}

__global__ void vote_kernel(int lanes_below, unsigned* out) {
  const bool predicate = static_cast<int>(threadIdx.x) < lanes_below;
  out[threadIdx.x] = __ballot_sync(~0u, predicate);
  out[threadIdx.x + 32] =
      static_cast<unsigned>(__any_sync(~0u, predicate) * 2 + __all_sync(~0u, predicate));
}

__global__ void atomics_kernel(unsigned* out) {
  const unsigned i = threadIdx.x + blockIdx.x * blockDim.x;
  atomicAdd(&out[0], 1u);
  atomicMax(&out[1], i);
  atomicMin(&out[2], i);
  atomicOr(&out[3], 1u << i % 32);
  atomicAnd(&out[4], ~(1u << i % 32));
  atomicSub(&out[5], 1u);
  // A counter by compare and swap.
  unsigned seen = out[7];  // never written: what a plain load before the loop would give
  while (true) {
    const unsigned found = atomicCAS(&out[6], seen, seen + 2);
    if (found == seen) break;
    seen = found;
  }
}

// Slot 0 counts; slot 1 + n names the thread that came n-th.
__global__ void arrival_kernel(unsigned* slots) {
  const unsigned n = atomicAdd(&slots[0], 1u);
  slots[1 + n] = blockIdx.x * blockDim.x + threadIdx.x;
}

__global__ void mma_kernel(MmaArgs args) {
  ptx::FragmentA a;
  ptx::FragmentB b;
  ptx::Accumulators c;
  for (int i = 0; i < 4; ++i) a.r[i] = args.a[threadIdx.x * 4 + i];
  for (int i = 0; i < 2; ++i) b.r[i] = args.b[threadIdx.x * 2 + i];
  for (int i = 0; i < 4; ++i) c.r[i] = args.c[threadIdx.x * 4 + i];
  if (args.fp16) {
    ptx::mma<__half>(c, a, b);
  } else {
    ptx::mma<__nv_bfloat16>(c, a, b);
  }
  for (int i = 0; i < 4; ++i) args.d[threadIdx.x * 4 + i] = c.r[i];
}

__global__ void ldmatrix_kernel(const std::uint16_t* in, std::uint32_t* out, bool transpose) {
  SLUICE_SHARED(std::uint16_t, rows, [32][8]);
  for (int i = 0; i < 8; ++i) rows[threadIdx.x][i] = in[threadIdx.x * 8 + i];
  __syncwarp();
  std::uint32_t matrices[4];
  if (transpose) {
    ptx::ldmatrix_x4_trans(matrices, rows[threadIdx.x]);
  } else {
    ptx::ldmatrix_x4(matrices, rows[threadIdx.x]);
  }
  for (int m = 0; m < 4; ++m) out[threadIdx.x * 4 + m] = matrices[m];
}

__global__ void cp_async_kernel(const int* in, int* out, int from_bytes) {
  SLUICE_DYNAMIC_SHARED(staged);
  int* const mine = reinterpret_cast<int*>(staged) + threadIdx.x * 4;
  ptx::cp_async16(mine, in + threadIdx.x * 4, from_bytes);
  ptx::cp_async_commit();
  ptx::cp_async_wait<0>();
  __syncthreads();
  const int* const next = reinterpret_cast<int*>(staged) + (threadIdx.x + 1) % blockDim.x * 4;
  for (int i = 0; i < 4; ++i) out[threadIdx.x * 4 + i] = next[i];
}

// A double buffer: the copy of the next stage is in flight while this one is added up.
__global__ void two_stages_kernel(const int* in, int* out, int stages) {
  SLUICE_SHARED(int, buffer, [2][32][4]);
  const int lane = static_cast<int>(threadIdx.x);
  const auto load = [&](int stage) {
    if (stage < stages) ptx::cp_async16(buffer[stage % 2][lane], in + (stage * 32 + lane) * 4);
    ptx::cp_async_commit();
  };
  int sum = 0;
  load(0);
  for (int stage = 0; stage < stages; ++stage) {
    load(stage + 1);
    ptx::cp_async_wait<1>();
    __syncthreads();
    for (int i = 0; i < 4; ++i) sum += buffer[stage % 2][(lane + stage) % 32][i];
    __syncthreads();
  }
  ptx::cp_async_wait<0>();
  out[lane] = sum;
}

__global__ void dependent_kernel(const int* previous, int* prologue, int* out) {
  ptx::grid_launch_dependents();
  prologue[threadIdx.x] = 1;
  ptx::grid_dependency_wait();
  out[threadIdx.x] = previous[threadIdx.x] + 1;
}

__global__ void answer_kernel(std::uint32_t* posted, const std::uint32_t* served, int* out) {
  if (threadIdx.x == 0) {
    ptx::store_release_sys(posted, 7);
    while (ptx::load_acquire_sys(served) != 8) {
    }
  }
  __syncthreads();
  out[threadIdx.x] = 1;
}

// Block b goes after block b - 1, whatever the order they run in.
__global__ void blocks_in_turn_kernel(std::uint32_t* turns, int* out) {
  if (threadIdx.x == 0) {
    while (ptx::load_acquire_gpu(&turns[blockIdx.x]) != 1) {
    }
    // What the block before it wrote, and one further back, of which it knows by the other.
    out[blockIdx.x + 1] = out[blockIdx.x] + out[blockIdx.x / 2] + 1;
    ptx::store_release_gpu(&turns[blockIdx.x + 1], 1);
  }
}

constexpr int kTable[8] = {3, 1, 4, 1, 5, 9, 2, 6};

__global__ void constants_kernel(int* out) { out[threadIdx.x] = kTable[threadIdx.x % 8]; }

__global__ void narrow_store_kernel(const float* in, __nv_bfloat16* out) {
  SLUICE_SHARED(__nv_bfloat16, staged, [64]);
  staged[threadIdx.x] = __float2bfloat16(in[threadIdx.x]);
  __syncthreads();
  out[threadIdx.x] = staged[threadIdx.x ^ 1];
}

// Neighbouring bytes by different threads and blocks are no race.
__global__ void mixed_bytes_kernel(unsigned char* out) {
  SLUICE_SHARED(unsigned char, bytes, [64]);
  bytes[threadIdx.x] = static_cast<unsigned char>(threadIdx.x - 1);
  bytes[threadIdx.x] = static_cast<unsigned char>(bytes[threadIdx.x] + 1);
  __syncthreads();
  out[threadIdx.x * gridDim.x + blockIdx.x] = bytes[63 - threadIdx.x];
}

__global__ void last_block_kernel(float* partials, unsigned* counter, float* out) {
  SLUICE_SHARED(unsigned, ticket, [1]);
  partials[blockIdx.x * blockDim.x + threadIdx.x] = static_cast<float>(blockIdx.x) + 1.0f;
  __syncthreads();
  if (threadIdx.x == 0) {
    __threadfence();
    ticket[0] = atomicAdd(counter, 1u);
  }
  __syncthreads();
  if (ticket[0] != gridDim.x - 1) return;
  float sum = 0.0f;
  for (unsigned b = 0; b < gridDim.x; ++b) sum += partials[b * blockDim.x + threadIdx.x];
  out[threadIdx.x] = sum;
}

// Each block reads what another block of the grid before it has written.
__global__ void reversed_kernel(const int* in, int* out) {
  const unsigned other = gridDim.x - 1 - blockIdx.x;
  out[blockIdx.x * 32 + threadIdx.x] = in[other * 32 + threadIdx.x];
}

// Block 0 publishes one half of a word and goes on to write the other.
__global__ void half_words_kernel(std::uint16_t* halves, std::uint32_t* flag, int* out) {
  if (threadIdx.x != 0) return;
  if (blockIdx.x == 0) {
    halves[0] = 7;
    ptx::store_release_gpu(flag, 1);
    halves[1] = 8;
  } else {
    while (ptx::load_acquire_gpu(flag) != 1) {
    }
    out[0] = halves[0];
  }
}

// A call that stays one returns a struct: g++ does not instrument its store.
__device__ __attribute__((noinline)) __nv_bfloat16 narrowed(float value) {
  return __float2bfloat16(value);
}

__global__ void escaping_stores_kernel(__nv_bfloat16* memory, float* out) {
  SLUICE_SHARED(__nv_bfloat16, staged, [32]);
  staged[threadIdx.x] = narrowed(1.5f);
  memory[threadIdx.x] = narrowed(2.5f);
  out[threadIdx.x] = __bfloat162float(staged[threadIdx.x]) + __bfloat162float(memory[threadIdx.x]);
}

// The warps in the order in which they get through three rounds.
__global__ void rounds_kernel(unsigned* slots) {
  for (int round = 0; round < 3; ++round) {
    if (threadIdx.x % 32 == 0) {
      const unsigned n = atomicAdd(&slots[0], 1u);
      atomicExch(&slots[1 + n], 1 + threadIdx.x / 32);
    }
    __syncwarp();
  }
}

__global__ void touch_kernel(int* p, long offset, bool write) {
  if (threadIdx.x != 0) return;
  if (write) {
    p[offset] = 1;
  } else if (p[offset] == 12345) {
    p[0] = 2;
  }
}

}  // namespace simt::testing
