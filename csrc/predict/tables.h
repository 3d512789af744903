#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "engine/scorer.h"

namespace sluice {

/// Errors: ConfigError unless a table has so many values.
void check_size(const char* name, std::size_t got, std::int64_t expected);

/// Appends who is probable enough; `not_used` holds 1 - p of each expert.
void append_guesses(std::span<const float> not_used, float least, LayerIdx layer,
                    std::int32_t layers_ahead, std::vector<LayerGuess>& guesses);

/// The product of a table's dimensions.
template <class... Dims>
[[nodiscard]] constexpr std::size_t table_size(Dims... dims) {
  return (static_cast<std::size_t>(dims) * ...);
}

/// out += scale · row.
inline void add_scaled(std::span<float> out, const float* row, float scale) {
  for (std::size_t i = 0; i < out.size(); ++i) out[i] += scale * row[i];
}

/// Several sums, so that they are kept in vectors.
inline float dot(std::span<const float> a, const float* b) {
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

}  // namespace sluice
