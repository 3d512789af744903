#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "engine/scorer.h"
#include "predict/alike_tokens.h"
#include "predict/expert_usage.h"

namespace sluice {

/// Guesses of the next layers below it are not told.
inline constexpr float kLeastProbability = 0.2F;

/// EdgeMoE's path table over single experts (2308.14352 §III-C1): the mean of P(e | a) over a
/// token's experts a of the layer before. The first layer reads the last one of the token before.
///
/// Shapes: pairs `[S, E, E]`: P(second at layer s | first at the layer before).
/// Errors: ConfigError when the shape does not fit.
[[nodiscard]] std::unique_ptr<Scorer> make_pair_scorer(std::vector<float> pairs,
                                                       std::int32_t num_layers,
                                                       std::int32_t num_experts);

/// The next layers' gates on an early state (2308.12066, 2603.19289): the state that entered this
/// layer's experts without its norm's scale, plus the mean step of such tokens to the layer that is
/// guessed, behind that layer's norm and gate. How far a choice is above the middle of the k-th and
/// the next one becomes a probability by a logistic curve.
///
/// Shapes: gate `[S, E, H]`; bias, correction `[S, E]`; scale, shift `[S, H]`; sigmoid, centred
/// `[S]`; ids `[N]`, ascending; means `[N + 1, S, H]` in fp16, of tokens with these ids, of all
/// tokens last; curves `[D, S, 2, 2]`: by layers ahead from 1 on, of tokens with a mean of their
/// own and of others, slope and offset.
struct GateTables {
  std::int32_t num_layers = 0;
  std::int32_t num_experts = 0;
  std::int32_t width = 0;
  std::int32_t max_layers = 0;  ///< D
  std::int32_t top_k = 0;
  std::vector<float> gate;
  std::vector<float> bias;
  std::vector<float> correction;
  std::vector<float> scale;
  std::vector<float> shift;
  std::vector<std::uint8_t> sigmoid;
  std::vector<std::uint8_t> centred;
  std::vector<std::int64_t> ids;
  std::vector<std::uint16_t> means;
  std::vector<float> curves;
};
/// Errors: ConfigError when a table's size does not fit the others.
[[nodiscard]] std::unique_ptr<Scorer> make_gate_scorer(GateTables tables);

/// The forecaster (`sluice.predict.networks.forecaster`): keep-scores of the layer that has routed,
/// and guesses for the same layer of the next token. Two outputs of its head are there: the
/// probability of a use by the next token, and the discounted next use that this cache ranks by.
///
/// Shapes: discounts `[R]`; window: tokens that futures are followed for. The head, as
/// `ForecastHead` names its parts, W wide with U units per expert: prefix, own `[S, E, W]`; bias
/// `[S, W]`; place `[S, 2, E, W]` of features context[0] and context[1]; position, place_bias
/// `[W]`; certain `[2, W]`; gate `[S, W, U]`; expert_in `[U, F + R]`; expert_in_bias `[U]`; out
/// `[S, 2, W, E]`; out_bias `[S, 2, E]`; expert_out `[2, U]`; expert_out_bias `[2]`.
struct ForecastTables {
  std::int32_t num_layers = 0;
  std::int32_t num_experts = 0;
  std::int32_t top_k = 0;
  std::int32_t hidden = 0;
  std::int32_t units = 0;
  std::int32_t window = 0;
  std::int32_t prompt_tokens = 0;  ///< of a longer forward, so many of the newest are read
  UsageShape usage;
  MemoryTables memory;
  std::vector<float> discounts;
  std::vector<std::int32_t> context;
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
/// Errors: ConfigError when a table's size does not fit the others.
[[nodiscard]] std::unique_ptr<Scorer> make_forecast_scorer(ForecastTables tables);

}  // namespace sluice
