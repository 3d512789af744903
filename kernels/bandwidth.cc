#include "kernels/bandwidth.h"

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <cstring>
#include <limits>

#include "kernels/cpu_isa.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace sluice {
namespace {

constexpr std::int64_t kBlock = 16 * 1024;  // bytes that one call of a read function takes
constexpr std::int64_t kGrain = 16;         // blocks: 256 KiB

// One load instruction with the stride of a line, by purpose: unrolled eight times the same loop
// read at a third of the rate on an EPYC 9004, whose prefetcher follows single instructions.

/// Keeps the reads: the compiler must suppose that `value` is used.
template <class T>
void keep(const T& value) {
  asm volatile("" : : "m"(value));
}

void read_plain(const std::byte* data) {
  std::uint64_t sum = 0;
#pragma GCC unroll 1
  for (std::int64_t at = 0; at < kBlock; at += 8) {
    std::uint64_t word;
    std::memcpy(&word, data + at, sizeof(word));
    sum ^= word;
  }
  keep(sum);
}

#if defined(__x86_64__)
__attribute__((target("avx2"))) void read_avx2(const std::byte* data) {
  __m256i sum = _mm256_setzero_si256();
#pragma GCC unroll 1
  for (std::int64_t at = 0; at < kBlock; at += 32) {
    const void* p = data + at;
    sum = _mm256_xor_si256(sum, _mm256_loadu_si256(static_cast<const __m256i*>(p)));
  }
  keep(sum);
}

__attribute__((target("avx512f"))) void read_avx512(const std::byte* data) {
  __m512i sum = _mm512_setzero_si512();
#pragma GCC unroll 1
  for (std::int64_t at = 0; at < kBlock; at += 64) {
    sum = _mm512_xor_si512(sum, _mm512_loadu_si512(data + at));
  }
  keep(sum);
}
#endif

using ReadFn = void (*)(const std::byte*);

ReadFn read_function() {
#if defined(__x86_64__)
  if (cpu_supports(CpuIsa::kAvx512)) return read_avx512;
  if (cpu_supports(CpuIsa::kAvx2)) return read_avx2;
#endif
  return read_plain;
}

}  // namespace

double read_bandwidth(const void* data, std::size_t bytes, int repeats, ParallelFor& parallel) {
  using Clock = std::chrono::steady_clock;
  const auto* begin_of_data = static_cast<const std::byte*>(data);
  const std::int64_t blocks = static_cast<std::int64_t>(bytes) / kBlock;
  const ReadFn read = read_function();
  auto range = [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t block = begin; block < end; ++block) read(begin_of_data + block * kBlock);
  };
  double best_s = std::numeric_limits<double>::infinity();
  for (int i = 0; i < repeats; ++i) {
    const auto start = Clock::now();
    parallel.run(blocks, kGrain, RangeFn(range));
    best_s = std::min(best_s, std::chrono::duration<double>(Clock::now() - start).count());
  }
  return static_cast<double>(blocks * kBlock) / best_s;
}

}  // namespace sluice
