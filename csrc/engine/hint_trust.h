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
/// newest ones came true, of all or of those of the same layer and rank (how many guesses for the
/// layer were open before it), guesses are refused but for one in kProbe demands, so that a
/// predictor that improves is heard again (P2: 2308.12066 gated by what the link can use). A liar
/// costs little: what is on its way until the first outcomes are known, and its probes.
///
/// Thread safety: none; the loader's lock guards it.
class HintTrust {
 public:
  explicit HintTrust(std::int32_t num_layers);

  /// Whether a guess for `layer` may be followed now. Ends in `began` if it is.
  [[nodiscard]] bool admits(LayerIdx layer) const;
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
  static constexpr double kMemory = 64;      // outcomes that count, about
  static constexpr std::size_t kRanks = 16;  // guesses of a higher rank share the last record
  static constexpr double kFirst = 8;        // outcomes until which anybody is believed
  static constexpr double kBreakEven = 0.25;
  static constexpr int kProbe = 64;

  struct Record {
    double came_true = 0;
    double all = 0;
    [[nodiscard]] bool believed() const { return all < kFirst || came_true >= kBreakEven * all; }
    void judge(bool came_true_now);
  };
  struct Open {
    ExpertKey key{};
    std::size_t record = 0;  // of by_rank_
    int visits = 0;
  };
  [[nodiscard]] std::size_t record_of(LayerIdx layer) const;
  [[nodiscard]] bool believed(std::size_t record) const;
  void judge(const Open& guess, bool came_true);

  std::vector<Open> open_;  // without an outcome yet
  Record together_;
  std::vector<Record> by_rank_;  // [L][kRanks]
  int demands_ = 0;              // since the last probe
};

}  // namespace sluice
