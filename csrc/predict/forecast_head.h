#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "base/ids.h"

namespace sluice {

/// The forecaster's dense layers, as `ForecastHead` of `sluice.predict.networks.forecast_head`
/// names its parts, with two of its outputs: 0, the probability of a use by the next token; 1, the
/// discounted next use that a cache ranks by.
///
/// Shapes, W wide with U units per expert and F features: prefix, own `[S, E, W]`; bias `[S, W]`;
/// place `[S, 2, E, W]`; position, place_bias `[W]`; certain `[2, W]`; gate `[S, W, U]`; expert_in
/// `[U, F]`; expert_in_bias `[U]`; out `[S, 2, W, E]`; out_bias `[S, 2, E]`; expert_out `[2, U]`;
/// expert_out_bias `[2]`.
struct ForecastHeadTables {
  std::int32_t hidden = 0;  ///< W
  std::int32_t units = 0;   ///< U
  std::vector<float> prefix;
  std::vector<float> own;
  std::vector<float> bias;
  std::vector<float> place;
  std::vector<float> position;
  std::vector<float> place_bias;
  std::vector<float> certain;
  std::vector<float> gate;
  std::vector<float> expert_in;
  std::vector<float> expert_in_bias;
  std::vector<float> out;
  std::vector<float> out_bias;
  std::vector<float> expert_out;
  std::vector<float> expert_out_bias;
};

/// Runs them for one token and layer at a time. Ids below 0 are nobody, others are experts.
class ForecastHead {
 public:
  /// Errors: ConfigError when a table's size does not fit.
  ForecastHead(ForecastHeadTables tables, std::int32_t num_layers, std::int32_t num_experts,
               std::int32_t num_features);

  [[nodiscard]] std::size_t width() const { return hidden_; }

  /// Adds what a token's routes of a layer say to all of its later layers: `prefix` `[W]`.
  void add_routes(LayerIdx layer, std::span<const std::int32_t> ids, std::span<float> prefix) const;
  /// Adds what the next token reads of feature `place` (0 or 1) of a layer's experts: `context`
  /// `[W]`.
  void add_context(LayerIdx layer, std::size_t place, std::span<const float> feature,
                   std::span<float> context) const;

  struct Inputs {
    std::span<const float> prefix;                  ///< [W], this layer's routes included
    std::array<std::span<const float>, 2> context;  ///< [W] each, of the token before
    std::int64_t position = 0;                      ///< tokens of the sequence before this one
    std::array<float, 2> sure{};                    ///< as `AlikeTokens::Found`
    std::span<const std::int32_t> ids;              ///< this layer's routes
    std::span<const float> features;                ///< [F, E]
  };
  /// Probabilities `[E]` of the layer's experts.
  void answer(LayerIdx layer, const Inputs& inputs, std::span<float> next_token,
              std::span<float> keep);

 private:
  void know(std::size_t layer, const Inputs& inputs);

  ForecastHeadTables t_;
  std::size_t num_experts_;
  std::size_t num_features_;
  std::size_t hidden_;
  std::size_t units_;
  // Of a call.
  std::vector<float> known_;     // [W]
  std::vector<float> gate_;      // [U]
  std::vector<float> units_of_;  // [U, E]
};

}  // namespace sluice
