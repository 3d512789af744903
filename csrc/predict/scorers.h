#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "engine/scorer.h"
#include "predict/alike_tokens.h"
#include "predict/expert_usage.h"
#include "predict/forecast_head.h"

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
/// and guesses for the same layer of the next token. The head's features are those of
/// `ExpertUsage`, then what followed similar tokens, by discount.
///
/// Shapes: discounts `[R]`, of a next use within `window` tokens; context `[2]`, the features of
/// `ExpertUsage` that the next token reads, of its own sequence first.
struct ForecastTables {
  std::int32_t num_layers = 0;
  std::int32_t num_experts = 0;
  std::int32_t top_k = 0;
  std::int32_t window = 0;
  std::int32_t prompt_tokens = 0;  ///< of a longer forward, so many of the newest are read
  UsageShape usage;
  MemoryTables memory;
  std::vector<float> discounts;
  std::vector<std::int32_t> context;
  ForecastHeadTables head;
};
/// Errors: ConfigError when a table's size does not fit the others.
[[nodiscard]] std::unique_ptr<Scorer> make_forecast_scorer(ForecastTables tables);

}  // namespace sluice
