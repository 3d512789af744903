#include "predict/forecast_head.h"

#include <algorithm>
#include <cmath>
#include <string>
#include <utility>

#include "base/error.h"
#include "predict/scorer_parts.h"

namespace sluice {
namespace {

constexpr std::size_t kOutputs = 2;

float sigmoid(float x) { return 1.0F / (1.0F + std::exp(-x)); }

void silu(std::span<float> values) {
  for (float& x : values) x *= sigmoid(x);
}

void check(const ForecastHeadTables& t, std::int64_t layers, std::int64_t experts,
           std::int64_t features) {
  require<ConfigError>(layers > 0 && experts > 0 && t.hidden > 0 && t.units > 0, [&] {
    return "scorer: got a forecaster of " + std::to_string(layers) + " layers, " +
           std::to_string(experts) + " experts, width " + std::to_string(t.hidden) + " and " +
           std::to_string(t.units) + ", expected some of each";
  });
  const std::int64_t wide = t.hidden;
  check_size("prefix", t.prefix.size(), layers * experts * wide);
  check_size("own", t.own.size(), layers * experts * wide);
  check_size("bias", t.bias.size(), layers * wide);
  check_size("place", t.place.size(), layers * 2 * experts * wide);
  check_size("position", t.position.size(), wide);
  check_size("place_bias", t.place_bias.size(), wide);
  check_size("certain", t.certain.size(), 2 * wide);
  check_size("gate", t.gate.size(), layers * wide * t.units);
  check_size("expert_in", t.expert_in.size(), features * t.units);
  check_size("expert_in_bias", t.expert_in_bias.size(), t.units);
  check_size("out", t.out.size(), layers * 2 * wide * experts);
  check_size("out_bias", t.out_bias.size(), layers * 2 * experts);
  check_size("expert_out", t.expert_out.size(), 2 * t.units);
  check_size("expert_out_bias", t.expert_out_bias.size(), 2);
}

std::size_t number(LayerIdx layer) { return static_cast<std::size_t>(to_int(layer)); }

}  // namespace

ForecastHead::ForecastHead(ForecastHeadTables tables, std::int32_t num_layers,
                           std::int32_t num_experts, std::int32_t num_features)
    : t_((check(tables, num_layers, num_experts, num_features), std::move(tables))),
      num_experts_(static_cast<std::size_t>(num_experts)),
      num_features_(static_cast<std::size_t>(num_features)),
      hidden_(static_cast<std::size_t>(t_.hidden)),
      units_(static_cast<std::size_t>(t_.units)),
      known_(hidden_),
      gate_(units_),
      units_of_(units_ * num_experts_) {}

void ForecastHead::add_routes(LayerIdx layer, std::span<const std::int32_t> ids,
                              std::span<float> prefix) const {
  for (const std::int32_t id : ids) {
    if (id < 0) continue;
    const std::size_t at = number(layer) * num_experts_ + static_cast<std::size_t>(id);
    add_scaled(prefix, t_.prefix.data() + at * hidden_, 1);
  }
}

void ForecastHead::add_context(LayerIdx layer, std::size_t place, std::span<const float> feature,
                               std::span<float> context) const {
  const std::size_t at = (number(layer) * 2 + place) * num_experts_;
  add_rows(context, t_.place.data() + at * hidden_, feature);
}

void ForecastHead::know(std::size_t layer, const Inputs& inputs) {
  std::copy(t_.place_bias.begin(), t_.place_bias.end(), known_.begin());
  for (const std::span<const float> each : inputs.context) add_scaled(known_, each.data(), 1);
  add_scaled(known_, t_.position.data(), std::log1p(static_cast<float>(inputs.position)) / 5);
  add_scaled(known_, inputs.prefix.data(), 1);
  add_scaled(known_, t_.bias.data() + layer * hidden_, 1);
  add_rows(known_, t_.certain.data(), inputs.sure);
  for (const std::int32_t id : inputs.ids) {
    if (id < 0) continue;
    const std::size_t at = layer * num_experts_ + static_cast<std::size_t>(id);
    add_scaled(known_, t_.own.data() + at * hidden_, 1);
  }
  silu(known_);
}

// What the layer's experts have in common, and what is each one's own.
void ForecastHead::answer(LayerIdx layer, const Inputs& inputs, std::span<float> next_token,
                          std::span<float> keep) {
  const std::size_t l = number(layer);
  know(l, inputs);
  std::copy(t_.expert_in_bias.begin(), t_.expert_in_bias.end(), gate_.begin());
  add_rows(gate_, t_.gate.data() + l * hidden_ * units_, known_);
  for (std::size_t u = 0; u < units_; ++u) {
    const std::span<float> unit(units_of_.data() + u * num_experts_, num_experts_);
    std::fill(unit.begin(), unit.end(), gate_[u]);
    add_rows(unit, inputs.features.data(),
             {t_.expert_in.data() + u * num_features_, num_features_});
  }
  silu(units_of_);
  for (std::size_t g = 0; g < kOutputs; ++g) {
    const std::span<float> logits = g == 0 ? next_token : keep;
    const std::size_t at = l * kOutputs + g;
    for (std::size_t e = 0; e < num_experts_; ++e) {
      logits[e] = t_.out_bias[at * num_experts_ + e] + t_.expert_out_bias[g];
    }
    add_rows(logits, t_.out.data() + at * hidden_ * num_experts_, known_);
    add_rows(logits, units_of_.data(), {t_.expert_out.data() + g * units_, units_});
    for (float& each : logits) each = sigmoid(each);
  }
}

}  // namespace sluice
