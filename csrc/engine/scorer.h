#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "base/ids.h"
#include "engine/forward.h"
#include "engine/grouping.h"

namespace sluice {

/// One forward of the model, told before its first layer. Row r of its calls is token r % tokens of
/// request r / tokens.
struct StepRows {
  std::span<const std::int64_t> requests;   ///< [B], numbers that never come again
  std::int64_t tokens = 1;                  ///< of each request; one: it decodes
  std::span<const std::int64_t> token_ids;  ///< [B · tokens], or empty: unknown
};

/// A guess of a scorer: who a layer will need that comes so many layers later.
struct LayerGuess {
  ExpertKey key{};
  float probability = 0;
  std::int32_t layers_ahead = 1;
};

/// Keep-scores of whole layers, `[n, E]` with E of the largest layer; none: nothing is said.
struct LayerScores {
  LayerIdx first_layer{};
  std::span<const float> scores;
};

/// The one piece of prediction in the core: what a layer's routes and states say of the next few
/// layers, and of who should stay. Runs inside of a forward, without Python, so it may cost no more
/// than tables and small dense products.
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
    bool reads_weights = false;    ///< of the routing
  };
  [[nodiscard]] virtual Shape shape() const = 0;
  /// Layers follow that are of these rows, unless somebody else's come in between.
  virtual void begin_step(const StepRows& /*rows*/) {}
  /// Rows of a call above which nothing is asked in time: a batch of more needs nearly everybody.
  static constexpr std::int64_t kMostRows = 8;
  /// Who should stay: asked before the call's demands take their slots, of more rows once they are
  /// on their way. Valid until the next call.
  [[nodiscard]] virtual LayerScores rank(const ForwardArgs& /*args*/) { return {}; }
  /// Appends guesses; asked once the call's demands are on their way.
  virtual void guess(const ForwardArgs& args, const Grouping& grouping,
                     std::vector<LayerGuess>& guesses) = 0;
};

}  // namespace sluice
