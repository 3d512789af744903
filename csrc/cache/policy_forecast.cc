#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

#include "cache/decayed_counts.h"
#include "cache/policies.h"

namespace sluice {
namespace {

constexpr double kHalfLifeSteps = 16;       // of the frequency that stands in for a forecast
constexpr std::int64_t kMaxAgeSteps = 16;   // an older row is none
constexpr double kWindowEvents = 512;       // after which a shadow's miss counts half
constexpr std::int64_t kFirstEvents = 256;  // ruled by frequency, whatever the shadows say
constexpr double kTolerated = 0.02;         // more misses than frequency's, as a share of them

std::size_t slots_of_a_layer(PolicyShape shape) {
  const std::int32_t layers = shape.layers_served > 0 ? shape.layers_served : shape.num_layers;
  return static_cast<std::size_t>(std::max(1, shape.num_slots / layers));
}

// Keep-scores, and a judge of them. Two shadow caches, lists of ids without bytes, see the same
// events: one keeps who scores best, the other who is used most. While the first misses no more
// than the second, keep-scores choose the victims here; once it misses 2 % more, frequency does;
// in between the last ruler stays. A change of ruler moves no bytes: it changes the next victim.
class ForecastPolicy final : public Policy {
 public:
  ForecastPolicy(PolicyShape shape, bool judged)
      : judged_(judged),
        counts_(shape, kHalfLifeSteps),
        guessed_(shape),
        scores_(shape, 0.0F),
        made_at_(static_cast<std::size_t>(shape.num_layers), kNever),
        width_(static_cast<std::size_t>(shape.max_experts)),
        shadow_slots_(slots_of_a_layer(shape)) {
    for (auto* const shadows : {&by_score_, &by_frequency_}) {
      shadows->resize(static_cast<std::size_t>(shape.num_layers));
      for (std::vector<ExpertIdx>& each : *shadows) each.reserve(shadow_slots_ + width_);
    }
    pending_.reserve(width_);
  }

  // A layer's own rows come after its router has spoken, so the shadows take an event when the
  // next one begins.
  void on_event(const CacheEvent& event) override {
    if (judged_) settle();
    counts_.on_event(event);
    guessed_.on_event(event);
    step_ = event.step;
    pending_layer_ = event.layer;
    pending_.assign(event.experts.begin(), event.experts.end());
  }

  void on_forecast(const ForecastRows& rows) override {
    for (std::size_t begin = 0; begin + width_ <= rows.scores.size(); begin += width_) {
      const LayerIdx layer{to_int(rows.first_layer) + static_cast<std::int32_t>(begin / width_)};
      std::copy_n(rows.scores.begin() + static_cast<std::ptrdiff_t>(begin), width_,
                  scores_.layer(layer).begin());
      made_at_[static_cast<std::size_t>(to_int(layer))] = rows.step;
    }
  }

  void on_load(ExpertKey key, bool guessed) override { guessed_.on_load(key, guessed); }

  [[nodiscard]] std::size_t victim(std::span<const Candidate> candidates) override {
    const bool forecast = score_rules_ && std::all_of(candidates.begin(), candidates.end(),
                                                      [&](const Candidate& each) {
                                                        return is_fresh(each.key.layer);
                                                      });
    if (forecast) return least_kept(candidates, [&](ExpertKey key) { return scores_[key]; });
    return least_kept(candidates, [&](ExpertKey key) { return worth(key); });
  }

  [[nodiscard]] bool admits_hint(ExpertKey incoming, ExpertKey victim) override {
    if (score_rules_ && is_fresh(incoming.layer) && is_fresh(victim.layer)) {
      return scores_[incoming] > scores_[victim];
    }
    return counts_.used_once_more(incoming) > worth(victim);
  }

 private:
  static constexpr std::int64_t kNever = std::numeric_limits<std::int64_t>::min() / 2;

  // By frequency.
  [[nodiscard]] double worth(ExpertKey key) const {
    return guessed_[key] ? counts_.used_once_more(key) : counts_[key];
  }
  [[nodiscard]] bool is_fresh(LayerIdx layer) const {
    return step_ - made_at_[static_cast<std::size_t>(to_int(layer))] <= kMaxAgeSteps;
  }

  void settle() {
    if (pending_.empty()) return;
    const auto layer = static_cast<std::size_t>(to_int(pending_layer_));
    const bool fresh = is_fresh(pending_layer_);
    const double more = misses(by_score_[layer], [&](ExpertKey key) {
      return fresh ? double{scores_[key]} : counts_[key];
    });
    const double base = misses(by_frequency_[layer], [&](ExpertKey key) { return counts_[key]; });
    const double kept = std::exp2(-1.0 / kWindowEvents);
    excess_ = excess_ * kept + more - base;
    frequency_misses_ = frequency_misses_ * kept + base;
    // No credit for a better past: who turns liar is found out as soon as anybody else.
    excess_ = std::max(excess_, -kTolerated * frequency_misses_);
    if (++events_ <= kFirstEvents) return;
    if (excess_ <= 0) score_rules_ = true;
    if (excess_ > kTolerated * frequency_misses_) score_rules_ = false;
  }

  // Passes the pending event through a shadow: how many of its experts were not there.
  template <class KeepScore>
  [[nodiscard]] double misses(std::vector<ExpertIdx>& shadow, KeepScore&& keep_score) {
    std::int32_t missed = 0;
    for (const ExpertIdx expert : pending_) {
      if (std::find(shadow.begin(), shadow.end(), expert) != shadow.end()) continue;
      shadow.push_back(expert);
      ++missed;
    }
    while (shadow.size() > shadow_slots_) {  // of equals the newcomer leaves: the later one
      auto least = shadow.begin();
      for (auto each = shadow.begin(); each != shadow.end(); ++each) {
        if (keep_score({pending_layer_, *each}) <= keep_score({pending_layer_, *least})) {
          least = each;
        }
      }
      shadow.erase(least);
    }
    return missed;
  }

  bool judged_;
  DecayedCounts counts_;
  Guessed guessed_;
  PerExpert<float> scores_;
  std::vector<std::int64_t> made_at_;  // step, by layer
  std::size_t width_;
  std::int64_t step_ = 0;

  std::size_t shadow_slots_;  // of a layer
  std::vector<std::vector<ExpertIdx>> by_score_;
  std::vector<std::vector<ExpertIdx>> by_frequency_;
  LayerIdx pending_layer_{};
  std::vector<ExpertIdx> pending_;
  std::int64_t events_ = 0;
  double excess_ = 0;  // misses of the first shadow above those of the second, in the window
  double frequency_misses_ = 0;
  bool score_rules_ = !judged_;
};

}  // namespace

std::unique_ptr<Policy> make_forecast_policy(PolicyShape shape, bool judged) {
  return std::make_unique<ForecastPolicy>(shape, judged);
}

}  // namespace sluice
