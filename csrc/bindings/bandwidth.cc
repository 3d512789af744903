#include "bindings/bandwidth.h"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <exception>
#include <mutex>
#include <thread>
#include <vector>

#include "base/bytes.h"
#include "base/clock.h"
#include "base/error.h"
#include "kernels/cpu_isa.h"
#include "store/file.h"
#include "store/io_scratch.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace sluice::bindings {
namespace {

constexpr std::int64_t kBlock = 4096;  // bytes; one unit of the loop's range

std::uint64_t sum_plain(const std::byte* data, std::int64_t bytes) {
  std::uint64_t sums[8] = {};
  for (std::int64_t at = 0; at < bytes; at += 64) {
    std::uint64_t words[8];
    std::memcpy(words, data + at, sizeof(words));
    for (int i = 0; i < 8; ++i) sums[i] += words[i];
  }
  std::uint64_t total = 0;
  for (const std::uint64_t sum : sums) total += sum;
  return total;
}

#if defined(__x86_64__)
// Four accumulators: one would be bound by the latency of the add, not by memory.
__attribute__((target("avx512f"))) std::uint64_t sum_avx512(const std::byte* data,
                                                            std::int64_t bytes) {
  __m512i sums[4] = {};
  for (std::int64_t at = 0; at < bytes; at += 256) {
    for (int i = 0; i < 4; ++i) {
      sums[i] = _mm512_add_epi64(sums[i], _mm512_loadu_si512(data + at + 64 * i));
    }
  }
  const __m512i low = _mm512_add_epi64(sums[0], sums[1]);
  return static_cast<std::uint64_t>(
      _mm512_reduce_add_epi64(_mm512_add_epi64(low, _mm512_add_epi64(sums[2], sums[3]))));
}
#endif

using SumFn = std::uint64_t (*)(const std::byte*, std::int64_t);

SumFn best_sum() {
#if defined(__x86_64__)
  if (cpu_supports(CpuIsa::kAvx512)) return &sum_avx512;
#endif
  return &sum_plain;
}

double per_second(double bytes, Nanos begin, Nanos end) {
  return bytes / (static_cast<double>(std::max<Nanos>(end - begin, 1)) * 1e-9);
}

}  // namespace

double read_bandwidth(std::span<const std::byte> memory, int repeats, ParallelFor& parallel) {
  const auto blocks = static_cast<std::int64_t>(memory.size()) / kBlock;
  require<ConfigError>(blocks > 0 && repeats > 0, [&] {
    return "read bandwidth: got " + std::to_string(memory.size()) + " bytes " +
           std::to_string(repeats) + " times, expected 4096 bytes or more, once or more";
  });
  const SumFn sum = best_sum();
  std::atomic<std::uint64_t> total{0};  // used, so that no loop is optimised away
  const auto range = [&](std::int64_t begin, std::int64_t end) {
    total.fetch_add(sum(memory.data() + begin * kBlock, (end - begin) * kBlock),
                    std::memory_order_relaxed);
  };
  const std::int64_t grain = std::max<std::int64_t>(1, blocks / (4 * parallel.num_threads()));
  const SteadyClock clock;
  const Nanos begin = clock.now();
  for (int repeat = 0; repeat < repeats; ++repeat) parallel.run(blocks, grain, range);
  const Nanos end = clock.now();
  return per_second(static_cast<double>(blocks * kBlock) * repeats, begin, end);
}

double disk_bandwidth(const std::string& path, std::uint64_t offset, std::uint64_t nbytes,
                      std::size_t chunk_bytes, int num_threads) {
  const ReadFile file(path);
  const std::uint64_t first = align_down(offset, kDirectAlignment);
  const std::size_t chunk = align_up(chunk_bytes, kDirectAlignment);
  require<ConfigError>(
      num_threads >= 1 && num_threads <= 256 && chunk_bytes > 0 && chunk <= kGiB && nbytes > 0 &&
          offset <= file.bytes() && nbytes <= file.bytes() - offset,
      [&] {
        return "disk bandwidth: got bytes " + std::to_string(offset) + " + " +
               std::to_string(nbytes) + " in chunks of " + std::to_string(chunk_bytes) + " on " +
               std::to_string(num_threads) + " threads, expected a range of the file's " +
               std::to_string(file.bytes()) + " bytes, a chunk up to 1 GiB and 1 to 256 threads";
      });
  const std::uint64_t last = offset + nbytes;
  std::atomic<std::uint64_t> next{first};
  std::mutex mutex;
  std::exception_ptr failure;
  const auto work = [&] {
    try {
      const AlignedBuffer buffer(chunk);
      ReadFile::Cost cost;
      for (;;) {
        const std::uint64_t at = next.fetch_add(chunk);
        if (at >= last) return;
        const std::size_t bytes =
            std::min<std::uint64_t>(chunk, align_up(last, kDirectAlignment) - at);
        file.read_aligned(at, bytes, std::min<std::uint64_t>(bytes, last - at), buffer.data(),
                          cost);
      }
    } catch (const std::exception&) {
      const std::lock_guard lock(mutex);
      failure = std::current_exception();
    }
  };
  const SteadyClock clock;
  const Nanos begin = clock.now();
  {
    std::vector<std::jthread> threads;
    for (int i = 0; i < num_threads; ++i) threads.emplace_back(work);
  }
  const Nanos end = clock.now();
  if (failure != nullptr) std::rethrow_exception(failure);
  return per_second(static_cast<double>(last - first), begin, end);
}

}  // namespace sluice::bindings
