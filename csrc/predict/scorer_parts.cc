#include "predict/scorer_parts.h"

#include <array>
#include <string>
#include <utility>

#include "base/error.h"
#include "kernels/cpu_isa.h"

namespace sluice {
namespace {

[[gnu::always_inline]] inline void add_rows_here(std::span<float> out, const float* rows,
                                                 std::span<const float> scales) {
  for (const float scale : scales) {
    for (std::size_t i = 0; i < out.size(); ++i) out[i] += scale * rows[i];
    rows += out.size();
  }
}

// Several sums, so that they are kept in vectors.
[[gnu::always_inline]] inline float dot_here(std::span<const float> a, const float* b) {
  std::array<float, 8> sums{};
  std::size_t i = 0;
  for (; i + sums.size() <= a.size(); i += sums.size()) {
    for (std::size_t j = 0; j < sums.size(); ++j) sums[j] += a[i + j] * b[i + j];
  }
  float sum = 0;
  for (; i < a.size(); ++i) sum += a[i] * b[i];
  for (const float each : sums) sum += each;
  return sum;
}

#if defined(__x86_64__)
[[gnu::target("avx2,fma")]] void add_rows_avx2(std::span<float> out, const float* rows,
                                               std::span<const float> scales) {
  add_rows_here(out, rows, scales);
}
[[gnu::target("avx2,fma")]] float dot_avx2(std::span<const float> a, const float* b) {
  return dot_here(a, b);
}
#endif

bool has_avx2() {
#if defined(__x86_64__)
  return cpu_isa() != CpuIsa::kScalar;
#else
  return false;
#endif
}

}  // namespace

void add_scaled(std::span<float> out, const float* row, float scale) {
  add_rows(out, row, {&scale, 1});
}

void add_rows(std::span<float> out, const float* rows, std::span<const float> scales) {
#if defined(__x86_64__)
  if (has_avx2()) return add_rows_avx2(out, rows, scales);
#endif
  add_rows_here(out, rows, scales);
}

float dot(std::span<const float> a, const float* b) {
#if defined(__x86_64__)
  if (has_avx2()) return dot_avx2(a, b);
#endif
  return dot_here(a, b);
}

void check_size(const char* name, std::size_t got, std::int64_t expected) {
  require<ConfigError>(std::cmp_equal(got, expected), [&] {
    return std::string("scorer: got ") + std::to_string(got) + " values of " + name +
           ", expected " + std::to_string(expected);
  });
}

void append_guesses(std::span<const float> not_used, float least, LayerIdx layer,
                    std::int32_t layers_ahead, std::vector<LayerGuess>& guesses) {
  for (std::size_t e = 0; e < not_used.size(); ++e) {
    const float probability = 1.0F - not_used[e];
    if (probability < least) continue;
    guesses.push_back({.key = {layer, ExpertIdx{static_cast<std::int32_t>(e)}},
                       .probability = probability,
                       .layers_ahead = layers_ahead});
  }
}

}  // namespace sluice
