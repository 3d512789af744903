// One kernel per function of kernels/ptx.h, registers in, registers out: the real bodies, which no
// emulation runs, against the definitions in test_probes.py. A few intrinsics that the emulation
// words itself are with them.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <cstring>

#include "kernels/launch.h"
#include "kernels/ptx.h"
#include "tests/gpu/native/api.h"

namespace {

namespace ptx = sluice::ptx;
using gpu_tests::Buffer;
using gpu_tests::expect;
using gpu_tests::Failed;
using gpu_tests::told;

/// Runs `launch(in, out)` on copies of the caller's bytes on the device.
template <class Launch>
const char* run(const void* in, std::size_t in_bytes, void* out, std::size_t out_bytes,
                Launch launch) {
  try {
    const Buffer from(in_bytes), to(out_bytes);
    const Buffer host(in_bytes > out_bytes ? in_bytes : out_bytes, Buffer::Kind::kPinned);
    std::memcpy(host.as<void>(), in, in_bytes);
    expect("copy in", cudaMemcpyAsync(from.as<void>(), host.as<void>(), in_bytes,
                                      cudaMemcpyHostToDevice, nullptr));
    expect("fill", cudaMemsetAsync(to.as<void>(), 0xFF, out_bytes, nullptr));
    expect("launch", launch(from.as<void>(), to.as<void>()));
    expect("kernel", cudaStreamSynchronize(nullptr));
    expect("copy out", cudaMemcpyAsync(host.as<void>(), to.as<void>(), out_bytes,
                                       cudaMemcpyDeviceToHost, nullptr));
    expect("end", cudaStreamSynchronize(nullptr));
    std::memcpy(out, host.as<void>(), out_bytes);
    return nullptr;
  } catch (const Failed& failed) {
    return told(failed.text);
  }
}

struct Words {
  const std::uint32_t* in;
  std::uint32_t* out;
  int option;
};
Words words(const void* in, void* out, int option = 0) {
  return {static_cast<const std::uint32_t*>(in), static_cast<std::uint32_t*>(out), option};
}

// in: per lane A[4], B[2], C[4]; out: per lane D[4].
template <class T>
__global__ void mma_kernel(const __grid_constant__ Words p) {
  const int lane = static_cast<int>(threadIdx.x);
  ptx::FragmentA a;
  ptx::FragmentB b;
  ptx::Accumulators c;
  const std::uint32_t* const in = p.in + lane * 10;
  for (int i = 0; i < 4; ++i) a.r[i] = in[i];
  for (int i = 0; i < 2; ++i) b.r[i] = in[4 + i];
  for (int i = 0; i < 4; ++i) c.r[i] = __uint_as_float(in[6 + i]);
  ptx::mma<T>(c, a, b);
  for (int i = 0; i < 4; ++i) p.out[lane * 4 + i] = __float_as_uint(c.r[i]);
}

// in: 32 rows of 16 bytes, the rows of four matrices; out: per lane four words.
template <bool kTransposed>
__global__ void ldmatrix_kernel(const __grid_constant__ Words p) {
  SLUICE_SHARED(std::uint32_t, rows, [32][4]);
  const int lane = static_cast<int>(threadIdx.x);
  for (int i = 0; i < 4; ++i) rows[lane][i] = p.in[lane * 4 + i];
  __syncthreads();
  std::uint32_t matrices[4];
  if constexpr (kTransposed) {
    ptx::ldmatrix_x4_trans(matrices, rows[lane]);
  } else {
    ptx::ldmatrix_x4(matrices, rows[lane]);
  }
  for (int i = 0; i < 4; ++i) p.out[lane * 4 + i] = matrices[i];
}

__global__ void load_stream_kernel(const __grid_constant__ Words p) {
  const int i = static_cast<int>(threadIdx.x) * 4;
  const uint4 value = ptx::load_stream(p.in + i);
  p.out[i] = value.x;
  p.out[i + 1] = value.y;
  p.out[i + 2] = value.z;
  p.out[i + 3] = value.w;
}

// Thread n of 17 copies n bytes of its 16 and leaves the rest to the zeros; then the second group.
__global__ void cp_async_kernel(const __grid_constant__ Words p) {
  SLUICE_SHARED(std::uint32_t, staged, [2][17][4]);
  const int thread = static_cast<int>(threadIdx.x);
  for (int i = 0; i < 4; ++i) staged[0][thread][i] = staged[1][thread][i] = 0xABABABABu;
  __syncthreads();
  ptx::cp_async16(staged[0][thread], p.in + thread * 4, thread);
  ptx::cp_async_commit();
  ptx::cp_async16(staged[1][thread], p.in + (16 - thread) * 4);
  ptx::cp_async_commit();
  ptx::cp_async_wait<1>();
  for (int i = 0; i < 4; ++i) p.out[thread * 4 + i] = staged[0][thread][i];
  ptx::cp_async_wait<0>();
  __syncthreads();
  for (int i = 0; i < 4; ++i) p.out[(17 + thread) * 4 + i] = staged[1][16 - thread][i];
}

// Two blocks hand `option` messages to each other: data plain, flags released and acquired. out[0]
// counts messages that came torn; out[1], out[2] are the flags, out[3] the message.
template <bool kSystem>
__global__ void messages_kernel(const __grid_constant__ Words p) {
  std::uint32_t* const sent = p.out + 1;
  std::uint32_t* const seen = p.out + 2;
  const auto load = [](const std::uint32_t* flag) {
    return kSystem ? ptx::load_acquire_sys(flag) : ptx::load_acquire_gpu(flag);
  };
  const auto store = [](std::uint32_t* flag, std::uint32_t value) {
    kSystem ? ptx::store_release_sys(flag, value) : ptx::store_release_gpu(flag, value);
  };
  std::uint32_t torn = 0;
  for (std::uint32_t n = 1; n <= static_cast<std::uint32_t>(p.option); ++n) {
    if (blockIdx.x == 0) {
      while (load(seen) != n - 1) {
      }
      p.out[3] = 3 * n + 1;
      store(sent, n);
    } else {
      while (load(sent) != n) {
      }
      if (p.out[3] != 3 * n + 1) ++torn;
      store(seen, n);
    }
  }
  if (blockIdx.x == 1) p.out[0] = torn;
}
__global__ void clear_kernel(const __grid_constant__ Words p) {
  for (int i = 0; i < p.option; ++i) p.out[i] = 0;
}

std::uint64_t __device__ __forceinline__ now() {
#if defined(SLUICE_EMULATE)
  return 0;
#else
  std::uint64_t nanoseconds;
  asm volatile("mov.u64 %0, %globaltimer;" : "=l"(nanoseconds));
  return nanoseconds;
#endif
}

void __device__ __forceinline__ pass([[maybe_unused]] int nanoseconds) {
#if !defined(SLUICE_EMULATE)  // where time does not pass
  const std::uint64_t until = now() + static_cast<std::uint64_t>(nanoseconds);
  while (now() < until) {
  }
#endif
}

/// One link of a chain of dependent launches: adds one to what the link ahead wrote.
struct Link {
  std::uint32_t* values;  // [links + 1]
  std::uint64_t* times;   // [links][2]: begin, end
  int number;
  int delay_ns;
  bool triggers_first;  // lets the next link start before it waits itself
};
__global__ void link_kernel(const __grid_constant__ Link p) {
  const std::uint64_t begin = now();
  if (p.triggers_first) ptx::grid_launch_dependents();
  ptx::grid_dependency_wait();
  if (!p.triggers_first) ptx::grid_launch_dependents();
  const std::uint32_t value = p.values[p.number];
  pass(p.delay_ns);
  p.values[p.number + 1] = value + 1;
  p.times[2 * p.number] = begin;
  p.times[2 * p.number + 1] = now();
}

// in: 32 words; out: per lane what shuffles of segments of `option` lanes give: from lane (i + 3),
// from 2 below, from 2 above, from lane ^ 5.
__global__ void shuffle_kernel(const __grid_constant__ Words p) {
  const int lane = static_cast<int>(threadIdx.x);
  const std::uint32_t value = p.in[lane];
  p.out[lane * 4] = __shfl_sync(~0u, value, lane + 3, p.option);
  p.out[lane * 4 + 1] = __shfl_up_sync(~0u, value, 2, p.option);
  p.out[lane * 4 + 2] = __shfl_down_sync(~0u, value, 2, p.option);
  p.out[lane * 4 + 3] = __shfl_xor_sync(~0u, value, 5, p.option);
}

// in: 32 words; out: ballot of odd ones, any of them above 100, all of them below 100.
__global__ void vote_kernel(const __grid_constant__ Words p) {
  const int lane = static_cast<int>(threadIdx.x);
  const std::uint32_t value = p.in[lane];
  p.out[lane * 3] = __ballot_sync(~0u, static_cast<int>(value % 2));
  p.out[lane * 3 + 1] = __any_sync(~0u, value > 100) != 0 ? 1 : 0;
  p.out[lane * 3 + 2] = __all_sync(~0u, value < 100) != 0 ? 1 : 0;
}

template <class Kernel>
cudaError_t one_block(Kernel kernel, unsigned threads, const Words& p, unsigned blocks = 1) {
  return sluice::launch("probe", {.grid = {blocks}, .block = {threads}}, kernel, p);
}

}  // namespace

SLUICE_GPU_API const char* probe_mma(int fp16, const void* in, void* out) {
  return run(in, 32 * 10 * 4, out, 32 * 4 * 4, [&](const void* from, void* to) {
    return one_block(fp16 != 0 ? mma_kernel<__half> : mma_kernel<__nv_bfloat16>, 32,
                     words(from, to));
  });
}
SLUICE_GPU_API const char* probe_ldmatrix(int transposed, const void* in, void* out) {
  return run(in, 512, out, 512, [&](const void* from, void* to) {
    return one_block(transposed != 0 ? ldmatrix_kernel<true> : ldmatrix_kernel<false>, 32,
                     words(from, to));
  });
}
SLUICE_GPU_API const char* probe_load_stream(const void* in, void* out) {
  return run(in, 1024, out, 1024, [&](const void* from, void* to) {
    return one_block(load_stream_kernel, 64, words(from, to));
  });
}
SLUICE_GPU_API const char* probe_cp_async(const void* in, void* out) {
  return run(in, 17 * 16, out, 2 * 17 * 16, [&](const void* from, void* to) {
    return one_block(cp_async_kernel, 17, words(from, to));
  });
}
SLUICE_GPU_API const char* probe_messages(int system, int count, void* out) {
  std::uint32_t nothing = 0;
  return run(&nothing, 4, out, 16, [&](const void* from, void* to) {
    const cudaError_t cleared = one_block(clear_kernel, 1, words(from, to, 4));
    if (cleared != cudaSuccess) return cleared;
    return one_block(system != 0 ? messages_kernel<true> : messages_kernel<false>, 1,
                     words(from, to, count), 2);
  });
}
/// out: links + 1 values, padded to 16 words, then begin and end in nanoseconds of each link; at
/// most 15 links. `event_after`: the link behind which an event is recorded, -1: none.
SLUICE_GPU_API const char* probe_chain(int links, int delay_ns, int triggers_first, int event_after,
                                       void* out) {
  std::uint32_t nothing = 0;
  const std::size_t bytes = 64 + static_cast<std::size_t>(links) * 16;
  return run(&nothing, 4, out, bytes, [&](const void* from, void* to) {
    cudaError_t code = one_block(clear_kernel, 1, words(from, to, static_cast<int>(bytes / 4)));
    const gpu_tests::Event event;
    for (int number = 0; number < links && code == cudaSuccess; ++number) {
      const Link link{.values = static_cast<std::uint32_t*>(to),
                      .times = reinterpret_cast<std::uint64_t*>(static_cast<char*>(to) + 64),
                      .number = number,
                      .delay_ns = delay_ns,
                      .triggers_first = triggers_first != 0};
      code = sluice::launch("link", {.grid = {1}, .block = {1}, .overlap_previous = number > 0},
                            link_kernel, link);
      if (number == event_after) (void)cudaEventRecord(event, nullptr);
    }
    return code;
  });
}
SLUICE_GPU_API const char* probe_shuffle(int width, const void* in, void* out) {
  return run(in, 128, out, 512, [&](const void* from, void* to) {
    return one_block(shuffle_kernel, 32, words(from, to, width));
  });
}
SLUICE_GPU_API const char* probe_vote(const void* in, void* out) {
  return run(in, 128, out, 384, [&](const void* from, void* to) {
    return one_block(vote_kernel, 32, words(from, to));
  });
}
