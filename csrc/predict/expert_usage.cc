#include "predict/expert_usage.h"

#include <algorithm>
#include <cmath>

#include "predict/scorer_parts.h"

namespace sluice {

ExpertUsage::ExpertUsage(const UsageShape& shape, std::int32_t num_layers, std::int32_t num_experts)
    : num_experts_(static_cast<std::size_t>(num_experts)),
      never_(shape.never),
      decayed_(table_size(num_layers, shape.half_lives.size(), num_experts)),
      age_(table_size(num_layers, num_experts), shape.never),
      in_sequence_(age_.size()) {
  for (const float half_life : shape.half_lives) fades_.push_back(std::exp2(-1.0F / half_life));
}

void ExpertUsage::advance(LayerIdx layer, std::span<const std::int32_t> experts,
                          std::span<const float> weights, std::span<float> features) {
  const auto at = static_cast<std::size_t>(to_int(layer)) * num_experts_;
  const std::span<float> age(age_.data() + at, num_experts_);
  const std::span<float> uses(in_sequence_.data() + at, num_experts_);
  const auto feature = [&](std::size_t f) { return features.subspan(f * num_experts_).data(); };
  float* const used = feature(kUsed);
  float* const weight = feature(kWeight);
  std::fill_n(used, num_experts_, 0.0F);
  std::fill_n(weight, num_experts_, 0.0F);
  for (std::size_t k = 0; k < experts.size(); ++k) {
    const auto e = static_cast<std::size_t>(experts[k]);
    if (experts[k] < 0 || e >= num_experts_) continue;
    used[e] = 1;
    weight[e] = 4 * weights[k];
  }
  const float length = static_cast<float>(tokens_ + 1) + 3;
  float* const ages = feature(kAge);
  float* const in_sequence = feature(kInSequence);
  for (std::size_t e = 0; e < num_experts_; ++e) {
    age[e] = used[e] > 0 ? 0 : std::min(age[e] + 1, never_);
    uses[e] += used[e];
    ages[e] = std::log1p(age[e]) * 0.25F - 0.8F;
    in_sequence[e] = std::sqrt((uses[e] + 0.3F) / length);
  }
  float* counts = decayed_.data() + at * fades_.size();
  for (std::size_t i = 0; i < fades_.size(); ++i, counts += num_experts_) {
    const float fade = fades_[i];
    float* const share = feature(kShares + i);
    for (std::size_t e = 0; e < num_experts_; ++e) {
      counts[e] = counts[e] * fade + used[e];
      share[e] = std::sqrt(counts[e] * (1 - fade));
    }
  }
}

void ExpertUsage::begin_sequence() {
  std::fill(in_sequence_.begin(), in_sequence_.end(), 0.0F);
  tokens_ = 0;
}

}  // namespace sluice
