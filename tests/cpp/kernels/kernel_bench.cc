// Reads weights that no cache holds, by a plain loop and by the few-token kernel in turns, and
// prints one JSON line per case: the rates and their ratio. Not a test: run it by hand.
//
//   sluice_kernel_bench [--mib N] [--threads N] [--rounds N] [--hidden N] [--intermediate N]
//                       [--experts-per-call N]

#include <sys/mman.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <random>
#include <string>
#include <vector>

#include "base/bytes.h"
#include "base/expert_layout.h"
#include "kernels/bandwidth.h"
#include "kernels/expert_decode.h"

namespace sluice {
namespace {

struct Settings {
  std::map<std::string, std::int64_t> values{{"mib", 256},           {"threads", 2},
                                             {"rounds", 9},          {"hidden", 2048},
                                             {"intermediate", 1408}, {"experts-per-call", 6}};
  [[nodiscard]] std::int64_t of(const char* name) const { return values.at(name); }
};

double median(std::vector<double> values) {
  std::sort(values.begin(), values.end());
  return values[values.size() / 2];
}

/// Pages on huge frames, filled with small finite weights of every type.
std::byte* make_weights(std::size_t bytes) {
  void* pages = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (pages == MAP_FAILED) std::abort();
  madvise(pages, bytes, MADV_HUGEPAGE);
  std::mt19937 random(1);
  auto* words = static_cast<std::uint32_t*>(pages);
  for (std::size_t i = 0; i < bytes / 4; ++i) {
    words[i] = (random() & 0x81ff81ffu) | 0x3c003c00u;  // 2^-7 or so as bf16 and fp32, 1 as fp16
  }
  return static_cast<std::byte*>(pages);
}

double seconds(const auto& work) {
  const auto start = std::chrono::steady_clock::now();
  work();
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

void bench(const Settings& settings, CpuIsa isa, DType dtype, std::int32_t tokens,
           const std::byte* weights, std::size_t bytes, ParallelFor& parallel) {
  const ExpertDecodeProblem problem{.weights = dtype,
                                    .activations = dtype,
                                    .hidden = settings.of("hidden"),
                                    .intermediate = settings.of("intermediate")};
  const ExpertLayout layout{
      .dtype = dtype, .hidden = problem.hidden, .intermediate = problem.intermediate};
  const std::size_t stride = align_up(layout.bytes(), kSlotAlignment);
  const std::size_t experts = bytes / stride;
  const auto group =
      std::min<std::size_t>(experts, static_cast<std::size_t>(settings.of("experts-per-call")));

  const auto width = static_cast<std::size_t>(problem.hidden);
  std::vector<float> inputs(width * static_cast<std::size_t>(tokens), 0.5f);
  std::vector<float> outputs(width * static_cast<std::size_t>(tokens) * group);
  std::vector<const float*> in;
  std::vector<float*> out;
  for (std::size_t t = 0; t < static_cast<std::size_t>(tokens); ++t) {
    in.push_back(inputs.data() + t * width);
  }
  for (std::size_t i = 0; i < group * static_cast<std::size_t>(tokens); ++i) {
    out.push_back(outputs.data() + i * width);
  }
  std::vector<ExpertWork> works(group);
  std::vector<float> scratch(static_cast<std::size_t>(
      expert_decode_scratch(problem, static_cast<std::int64_t>(group) * tokens)));

  const std::size_t calls = experts / group;
  const auto decode_all = [&] {
    for (std::size_t call = 0; call < calls; ++call) {
      for (std::size_t w = 0; w < group; ++w) {
        const std::byte* expert = weights + (call * group + w) * stride;
        works[w] = {.weights = {.w13 = expert, .w2 = expert + layout.w2_offset()},
                    .inputs = in.data(),
                    .outputs = out.data() + w * static_cast<std::size_t>(tokens),
                    .num_tokens = tokens};
      }
      expert_decode(isa, problem, works, scratch.data(), parallel);
    }
  };
  const double decoded = static_cast<double>(calls * group * layout.bytes());
  std::vector<double> read_rates;
  std::vector<double> decode_rates;
  std::vector<double> ratios;
  decode_all();
  for (std::int64_t round = 0; round < settings.of("rounds"); ++round) {
    read_rates.push_back(read_bandwidth(weights, bytes, 1, parallel) / 1e9);
    decode_rates.push_back(decoded / seconds(decode_all) / 1e9);
    ratios.push_back(decode_rates.back() / read_rates.back());
  }
  std::printf(
      "{\"isa\": \"%s\", \"dtype\": \"%s\", \"tokens\": %d, \"hidden\": %lld, \"intermediate\": "
      "%lld, \"threads\": %d, \"experts_per_call\": %zu, \"working_set_mib\": %zu, \"rounds\": "
      "%lld, \"read_gb_s\": %.2f, \"decode_gb_s\": %.2f, \"ratio\": %.3f, \"us_per_call\": %.1f}\n",
      std::string(cpu_isa_name(isa)).c_str(), std::string(dtype_name(dtype)).c_str(), tokens,
      static_cast<long long>(problem.hidden), static_cast<long long>(problem.intermediate),
      parallel.num_threads(), group, bytes >> 20, static_cast<long long>(settings.of("rounds")),
      median(read_rates), median(decode_rates), median(ratios),
      decoded / median(decode_rates) / 1e3 / static_cast<double>(calls));
  std::fflush(stdout);
}

int run(int argc, char** argv) {
  Settings settings;
  for (int i = 1; i + 1 < argc; i += 2) {
    const std::string name =
        std::string(argv[i]).substr(std::min<std::size_t>(2, std::strlen(argv[i])));
    if (settings.values.count(name) == 0) {
      std::fprintf(stderr, "unknown option %s\n", argv[i]);
      return 2;
    }
    settings.values[name] = std::atoll(argv[i + 1]);
  }
  const std::size_t bytes = static_cast<std::size_t>(settings.of("mib")) * kMiB;
  const std::byte* weights = make_weights(bytes);
  const auto pool = make_thread_pool(static_cast<int>(settings.of("threads")));
  for (const CpuIsa isa : {CpuIsa::kAvx512, CpuIsa::kAvx2}) {
    if (!cpu_supports(isa)) continue;
    for (const DType dtype : {DType::kBF16, DType::kF16, DType::kF32}) {
      for (std::int32_t tokens = 1; tokens <= kFewTokens; ++tokens) {
        bench(settings, isa, dtype, tokens, weights, bytes, *pool);
      }
    }
  }
  return 0;
}

}  // namespace
}  // namespace sluice

int main(int argc, char** argv) { return sluice::run(argc, argv); }
