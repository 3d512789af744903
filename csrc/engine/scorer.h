#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <vector>

#include "base/ids.h"
#include "engine/forward.h"
#include "engine/grouping.h"

namespace sluice {

/// A guess of a scorer: who a layer will need that comes so many layers later.
struct LayerGuess {
  ExpertKey key{};
  float probability = 0;
  std::int32_t layers_ahead = 1;
};

/// The one piece of prediction in the core: what a layer's routes and states say of the next few
/// layers. Runs inside of a forward, without Python, once the call's demands are on their way, so
/// it may cost no more than tables and small dense products.
///
/// Thread safety: one call at a time.
class Scorer {
 public:
  virtual ~Scorer() = default;
  /// Of the model that it was made for.
  struct Shape {
    std::int32_t num_layers = 0;
    std::int32_t num_experts = 0;  ///< of the largest layer
    std::int32_t width = 0;        ///< of the states that it reads; 0: it reads none
  };
  [[nodiscard]] virtual Shape shape() const = 0;
  /// Appends guesses, none of a probability below `kLeastProbability`.
  virtual void score(const ForwardArgs& args, const Grouping& grouping,
                     std::vector<LayerGuess>& guesses) = 0;

  static constexpr float kLeastProbability = 0.2F;
};

/// EdgeMoE's path table over single experts (2308.14352 §III-C1): the mean of P(e | a) over a
/// token's experts a of the layer before. The first layer reads the last one of the token before.
///
/// Shapes: pairs `[S, E, E]`: P(second at layer s | first at the layer before).
/// Errors: ConfigError when the shape does not fit.
[[nodiscard]] std::unique_ptr<Scorer> make_pair_scorer(std::vector<float> pairs,
                                                       std::int32_t num_layers,
                                                       std::int32_t num_experts);

/// The next layers' gates on an early state (2308.12066, 2603.19289): the state that entered this
/// layer's experts without its norm's scale, plus the mean step to the layer that is guessed,
/// behind that layer's norm and gate. How far a choice is above the middle of the k-th and the next
/// one becomes a probability by a logistic curve.
///
/// Shapes: gate `[S, E, H]`; bias, correction `[S, E]`; scale, shift `[S, H]`; sigmoid, centred
/// `[S]`; steps `[D, S, H]`, curves `[D, S, 2]` (slope, offset), by layers ahead from 1 on.
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
  std::vector<float> steps;
  std::vector<float> curves;
};
/// Errors: ConfigError when a table's size does not fit the others.
[[nodiscard]] std::unique_ptr<Scorer> make_gate_scorer(GateTables tables);

}  // namespace sluice
