#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "base/ids.h"

namespace sluice {

/// How often and how long ago experts were used, as numbers that a network reads. Features of an
/// expert, F = 4 + half-lives: age, used now, with which weight, share of the sequence's tokens,
/// and a share by half-life (`sluice.predict.networks.usage`).
struct UsageShape {
  std::vector<float> half_lives;  ///< in tokens
  float never = 0;                ///< an age from which on it makes no difference
};

/// What is known of every expert's uses so far: `UsageShape`'s features, a layer at a time.
///
/// Shapes: a layer's features are `[F, E]`: one feature of all experts side by side.
class ExpertUsage {
 public:
  ExpertUsage(const UsageShape& shape, std::int32_t num_layers, std::int32_t num_experts);

  static constexpr std::size_t kAge = 0;
  static constexpr std::size_t kUsed = 1;
  static constexpr std::size_t kWeight = 2;
  static constexpr std::size_t kInSequence = 3;
  static constexpr std::size_t kShares = 4;
  [[nodiscard]] std::size_t num_features() const { return kShares + fades_.size(); }

  /// A layer of the next token has routed: `features` are as of after it. Ids outside of the
  /// experts are nobody.
  void advance(LayerIdx layer, std::span<const std::int32_t> experts,
               std::span<const float> weights, std::span<float> features);
  /// All layers of the token have.
  void end_token() { ++tokens_; }
  /// The next token begins another sequence.
  void begin_sequence();

 private:
  std::size_t num_experts_;
  std::vector<float> fades_;
  float never_;
  std::vector<float> decayed_;      // [S, half-lives, E]
  std::vector<float> age_;          // [S, E]
  std::vector<float> in_sequence_;  // [S, E]
  std::int64_t tokens_ = 0;         // of the sequence, finished
};

}  // namespace sluice
