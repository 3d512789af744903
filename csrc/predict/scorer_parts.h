#pragma once

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
void add_scaled(std::span<float> out, const float* row, float scale);
/// out += Σ_i scales[i] · rows[i], rows `[scales, out]`.
void add_rows(std::span<float> out, const float* rows, std::span<const float> scales);
[[nodiscard]] float dot(std::span<const float> a, const float* b);

}  // namespace sluice
