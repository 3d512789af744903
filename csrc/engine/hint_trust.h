#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "base/ids.h"

namespace sluice {

/// Whether guesses deserve the link: what became of those that were followed lately.
///
/// A guess came true when its layer asked for the expert; it was wrong when the expert left its
/// slot unused, or its layer ran kPatience times without asking. When less than kBreakEven of the
/// newest ones (about kMemory) came true, guesses are refused but for one in kProbe demands, so
/// that a predictor that improves is heard again. A liar costs little: what is on its way until the
/// first outcomes are known, and its probes.
///
/// Thread safety: none; the loader's lock guards it.
class HintTrust {
 public:
  HintTrust() { open_.reserve(kMostOpen); }

  /// Whether the next guess may be followed. Ends in `began` if it is.
  [[nodiscard]] bool admits() const;
  void began(ExpertKey key);
  /// The load of a guess ended without its expert being asked for: evicted, failed, cancelled.
  void left(ExpertKey key);
  /// A demand's load has begun.
  void on_demand();
  /// `layer` asks for `experts`, which ascend.
  void on_event(LayerIdx layer, std::span<const ExpertIdx> experts);

 private:
  static constexpr std::size_t kMostOpen = 256;
  static constexpr int kPatience = 2;
  static constexpr double kMemory = 64;
  static constexpr double kFirst = 8;  // outcomes until which anybody is believed
  static constexpr double kBreakEven = 0.25;
  static constexpr int kProbe = 64;

  struct Open {
    ExpertKey key{};
    int visits = 0;
  };
  [[nodiscard]] bool believed() const;
  void judge(bool came_true);

  std::vector<Open> open_;  // without an outcome yet
  double true_ = 0;
  double all_ = 0;
  int demands_ = 0;  // since the last probe
};

}  // namespace sluice
