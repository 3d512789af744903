#pragma once

#include <cmath>
#include <cstddef>
#include <limits>

#include "cache/policies.h"

namespace sluice {

/// Uses of each expert that count half after `half_life` steps.
///
/// All counts shrink by the same factor, so they are kept as log2 f + step / h, which does not
/// change while time passes: they are compared without a clock, and equal histories compare equal,
/// bit by bit.
class DecayedCounts {
 public:
  DecayedCounts(PolicyShape shape, double half_life)
      : half_life_(half_life), log_count_(shape, -std::numeric_limits<double>::infinity()) {}

  void on_event(const CacheEvent& event) {
    now_ = static_cast<double>(event.step) / half_life_;
    for (std::size_t i = 0; i < event.experts.size(); ++i) {
      double& log_count = log_count_[{event.layer, event.experts[i]}];
      log_count = used_more(log_count, event.tokens.empty() ? 1.0 : uses(event, i));
    }
  }

  /// Orders experts; only comparing it with others of the same object means anything.
  [[nodiscard]] double operator[](ExpertKey key) const { return log_count_[key]; }
  /// What it would be if the expert were used now.
  [[nodiscard]] double used_once_more(ExpertKey key) const {
    return used_more(log_count_[key], 1.0);
  }

 private:
  [[nodiscard]] double used_more(double log_count, double uses) const {
    return std::log2(std::exp2(log_count - now_) + uses) + now_;
  }
  // What as many steps as the prompt has tokens leave of their uses, had they come evenly: the
  // share of tokens times 1 + 2^(-1/h) + 2^(-2/h) + …
  [[nodiscard]] double uses(const CacheEvent& event, std::size_t idx) const {
    const auto steps = static_cast<double>(event.num_tokens);
    return static_cast<double>(event.tokens[idx]) / steps * (1.0 - std::exp2(-steps / half_life_)) /
           (1.0 - std::exp2(-1.0 / half_life_));
  }

  double half_life_;
  double now_ = 0;  // the current step, in half-lives
  PerExpert<double> log_count_;
};

}  // namespace sluice
