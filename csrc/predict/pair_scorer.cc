#include <algorithm>
#include <array>
#include <cstddef>
#include <string>
#include <utility>

#include "base/error.h"
#include "predict/scorer_parts.h"
#include "predict/scorers.h"

namespace sluice {
namespace {

class PairScorer final : public Scorer {
 public:
  PairScorer(std::vector<float> pairs, std::int32_t num_layers, std::int32_t num_experts)
      : pairs_(std::move(pairs)),
        num_layers_(num_layers),
        num_experts_(static_cast<std::size_t>(num_experts)),
        not_used_(num_experts_) {
    check_size("pairs", pairs_.size(),
               static_cast<std::int64_t>(table_size(num_layers, num_experts, num_experts)));
    sums_.reserve(num_experts_ * kMostRows);
  }

  [[nodiscard]] Shape shape() const override {
    return {num_layers_, static_cast<std::int32_t>(num_experts_), 0};
  }

  void guess(const ForwardArgs& args, const Grouping& grouping,
             std::vector<LayerGuess>& guesses) override {
    if (args.num_tokens > kMostRows || args.top_k == 0) return;
    const std::int32_t next = (to_int(args.layer) + 1) % num_layers_;
    const auto num_tokens = static_cast<std::size_t>(args.num_tokens);
    sums_.assign(num_tokens * num_experts_, 0.0F);
    counts_.fill(0);
    for (const Grouping::Group& group : grouping.groups()) {
      const float* const told = pairs_.data() + (static_cast<std::size_t>(next) * num_experts_ +
                                                 static_cast<std::size_t>(group.expert)) *
                                                    num_experts_;
      for (const std::int64_t row : grouping.rows_of(group)) {
        const auto token = static_cast<std::size_t>(row / args.top_k);
        float* const sum = sums_.data() + token * num_experts_;
        for (std::size_t e = 0; e < num_experts_; ++e) sum[e] += told[e];
        ++counts_[token];
      }
    }
    std::fill(not_used_.begin(), not_used_.end(), 1.0F);
    for (std::size_t token = 0; token < num_tokens; ++token) {
      if (counts_[token] == 0) continue;
      const float share = 1.0F / static_cast<float>(counts_[token]);
      for (std::size_t e = 0; e < num_experts_; ++e) {
        not_used_[e] *= 1.0F - sums_[token * num_experts_ + e] * share;
      }
    }
    append_guesses(not_used_, kLeastProbability, LayerIdx{next}, 1, guesses);
  }

 private:
  std::vector<float> pairs_;
  std::int32_t num_layers_;
  std::size_t num_experts_;
  std::vector<float> sums_;  // [T, E]
  std::array<std::int32_t, kMostRows> counts_{};
  std::vector<float> not_used_;
};

}  // namespace

std::unique_ptr<Scorer> make_pair_scorer(std::vector<float> pairs, std::int32_t num_layers,
                                         std::int32_t num_experts) {
  require<ConfigError>(num_layers > 0 && num_experts > 0, [&] {
    return "scorer: got " + std::to_string(num_layers) + " layers of " +
           std::to_string(num_experts) + " experts, expected at least one of each";
  });
  return std::make_unique<PairScorer>(std::move(pairs), num_layers, num_experts);
}

}  // namespace sluice
