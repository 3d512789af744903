#include "engine/scorer.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstddef>
#include <functional>
#include <string>
#include <utility>

#include "base/error.h"
#include "kernels/convert.h"

namespace sluice {
namespace {

// A batch of more rows needs nearly every expert; nothing is worth guessing.
constexpr std::int64_t kMostTokens = 8;

void check_size(const char* name, std::size_t got, std::int64_t expected) {
  require<ConfigError>(std::cmp_equal(got, expected), [&] {
    return std::string("scorer: got ") + std::to_string(got) + " values of " + name +
           ", expected " + std::to_string(expected);
  });
}

std::size_t product(std::int32_t a, std::int32_t b, std::int32_t c = 1) {
  return static_cast<std::size_t>(a) * static_cast<std::size_t>(b) * static_cast<std::size_t>(c);
}

/// Appends who is probable enough; `not_used` holds 1 - p of each expert.
void append(std::span<const float> not_used, LayerIdx layer, std::int32_t layers_ahead,
            std::vector<LayerGuess>& guesses) {
  for (std::size_t e = 0; e < not_used.size(); ++e) {
    const float probability = 1.0F - not_used[e];
    if (probability < Scorer::kLeastProbability) continue;
    guesses.push_back({.key = {layer, ExpertIdx{static_cast<std::int32_t>(e)}},
                       .probability = probability,
                       .layers_ahead = layers_ahead});
  }
}

class PairScorer final : public Scorer {
 public:
  PairScorer(std::vector<float> pairs, std::int32_t num_layers, std::int32_t num_experts)
      : pairs_(std::move(pairs)),
        num_layers_(num_layers),
        num_experts_(static_cast<std::size_t>(num_experts)),
        not_used_(num_experts_) {
    check_size("pairs", pairs_.size(),
               static_cast<std::int64_t>(product(num_layers, num_experts, num_experts)));
    sums_.reserve(num_experts_ * kMostTokens);
  }

  [[nodiscard]] Shape shape() const override {
    return {num_layers_, static_cast<std::int32_t>(num_experts_), 0};
  }

  void score(const ForwardArgs& args, const Grouping& grouping,
             std::vector<LayerGuess>& guesses) override {
    if (args.num_tokens > kMostTokens || args.top_k == 0) return;
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
    append(not_used_, LayerIdx{next}, 1, guesses);
  }

 private:
  std::vector<float> pairs_;
  std::int32_t num_layers_;
  std::size_t num_experts_;
  std::vector<float> sums_;  // [T, E]
  std::array<std::int32_t, kMostTokens> counts_{};
  std::vector<float> not_used_;
};

class GateScorer final : public Scorer {
 public:
  explicit GateScorer(GateTables tables)
      : t_(std::move(tables)),
        width_(static_cast<std::size_t>(t_.width)),
        num_experts_(static_cast<std::size_t>(t_.num_experts)),
        normal_(width_),
        state_(width_),
        choices_(num_experts_),
        ordered_(num_experts_),
        not_used_(num_experts_) {
    require<ConfigError>(t_.num_layers > 0 && t_.width > 0 && t_.max_layers > 0 && t_.top_k > 0 &&
                             t_.top_k <= t_.num_experts,
                         [&] {
                           return "scorer: got gates of " + std::to_string(t_.num_layers) +
                                  " layers, width " + std::to_string(t_.width) + ", " +
                                  std::to_string(t_.max_layers) + " layers ahead, top " +
                                  std::to_string(t_.top_k) + " of " +
                                  std::to_string(t_.num_experts) + ", expected some of each";
                         });
    const std::int64_t layers = t_.num_layers;
    check_size("gate", t_.gate.size(), layers * t_.num_experts * t_.width);
    check_size("bias", t_.bias.size(), layers * t_.num_experts);
    check_size("correction", t_.correction.size(), layers * t_.num_experts);
    check_size("scale", t_.scale.size(), layers * t_.width);
    check_size("shift", t_.shift.size(), layers * t_.width);
    check_size("sigmoid", t_.sigmoid.size(), layers);
    check_size("centred", t_.centred.size(), layers);
    check_size("steps", t_.steps.size(), layers * t_.max_layers * t_.width);
    check_size("curves", t_.curves.size(), layers * t_.max_layers * 2);
  }

  [[nodiscard]] Shape shape() const override { return {t_.num_layers, t_.num_experts, t_.width}; }

  void score(const ForwardArgs& args, const Grouping& /*grouping*/,
             std::vector<LayerGuess>& guesses) override {
    const std::int32_t layer = to_int(args.layer);
    const std::int32_t last = std::min(t_.max_layers, t_.num_layers - 1 - layer);
    if (args.num_tokens > kMostTokens) return;
    for (std::int32_t ahead = 1; ahead <= last; ++ahead) {
      std::fill(not_used_.begin(), not_used_.end(), 1.0F);
      for (std::int64_t token = 0; token < args.num_tokens; ++token) {
        look(args, token, layer, layer + ahead, ahead);
      }
      append(not_used_, LayerIdx{layer + ahead}, ahead, guesses);
    }
  }

 private:
  static constexpr float kTiny = 1e-6F;

  [[nodiscard]] const float* row(const std::vector<float>& table, std::int32_t layer) const {
    return table.data() + static_cast<std::size_t>(layer) * width_;
  }

  void look(const ForwardArgs& args, std::int64_t token, std::int32_t from, std::int32_t to,
            std::int32_t ahead) {
    const auto* const hidden =
        static_cast<const std::byte*>(args.hidden) +
        static_cast<std::size_t>(token) * width_ * element_bytes(args.activations);
    widen(args.activations, hidden, normal_.data(), t_.width);
    const float* const scale = row(t_.scale, from);
    const float* const shift = row(t_.shift, from);
    const float* const step = t_.steps.data() + (static_cast<std::size_t>(ahead - 1) *
                                                     static_cast<std::size_t>(t_.num_layers) +
                                                 static_cast<std::size_t>(to)) *
                                                    width_;
    float mean = 0;
    for (std::size_t i = 0; i < width_; ++i) {
      const bool usable = std::abs(scale[i]) > kTiny;
      state_[i] = (usable ? (normal_[i] - shift[i]) / scale[i] : 0.0F) + step[i];
      mean += state_[i];
    }
    mean = t_.centred[static_cast<std::size_t>(to)] != 0 ? mean / static_cast<float>(t_.width) : 0;
    float square = 0;
    for (float& each : state_) {
      each -= mean;
      square += each * each;
    }
    const float size = std::max(std::sqrt(square / static_cast<float>(t_.width)), kTiny);
    const float* const to_scale = row(t_.scale, to);
    const float* const to_shift = row(t_.shift, to);
    for (std::size_t i = 0; i < width_; ++i) {
      state_[i] = to_scale[i] * (state_[i] / size) + to_shift[i];
    }
    choose(to);
    turn_into_probabilities(to, ahead);
  }

  // What the layer would choose the largest of.
  void choose(std::int32_t to) {
    for (std::size_t e = 0; e < num_experts_; ++e) {
      const std::size_t at = static_cast<std::size_t>(to) * num_experts_ + e;
      const float* const weights = t_.gate.data() + at * width_;
      // Several sums, so that they are kept in vectors.
      std::array<float, 8> sums{};
      std::size_t i = 0;
      for (; i + sums.size() <= width_; i += sums.size()) {
        for (std::size_t j = 0; j < sums.size(); ++j) sums[j] += weights[i + j] * state_[i + j];
      }
      float logit = t_.bias[at];
      for (; i < width_; ++i) logit += weights[i] * state_[i];
      for (const float sum : sums) logit += sum;
      if (t_.sigmoid[static_cast<std::size_t>(to)] != 0) logit = 1.0F / (1.0F + std::exp(-logit));
      choices_[e] = logit + t_.correction[at];
    }
  }

  void turn_into_probabilities(std::int32_t to, std::int32_t ahead) {
    ordered_ = choices_;
    const auto k = static_cast<std::size_t>(t_.top_k);
    const std::size_t next = std::min(k, num_experts_ - 1);
    std::partial_sort(ordered_.begin(), ordered_.begin() + static_cast<std::ptrdiff_t>(next + 1),
                      ordered_.end(), std::greater<>());
    const float middle = (ordered_[k - 1] + ordered_[next]) / 2;
    const float* const curve = t_.curves.data() + (static_cast<std::size_t>(ahead - 1) *
                                                       static_cast<std::size_t>(t_.num_layers) +
                                                   static_cast<std::size_t>(to)) *
                                                      2;
    for (std::size_t e = 0; e < num_experts_; ++e) {
      const float x = std::clamp(curve[0] * (choices_[e] - middle) + curve[1], -30.0F, 30.0F);
      not_used_[e] *= 1.0F - 1.0F / (1.0F + std::exp(-x));
    }
  }

  GateTables t_;
  std::size_t width_;
  std::size_t num_experts_;
  std::vector<float> normal_;
  std::vector<float> state_;
  std::vector<float> choices_;
  std::vector<float> ordered_;
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

std::unique_ptr<Scorer> make_gate_scorer(GateTables tables) {
  return std::make_unique<GateScorer>(std::move(tables));
}

}  // namespace sluice
