#include "engine/hint_trust.h"

#include <algorithm>

namespace sluice {

HintTrust::HintTrust(std::int32_t num_layers)
    : by_rank_(static_cast<std::size_t>(num_layers) * kRanks) {
  open_.reserve(kMostOpen);
}

std::size_t HintTrust::record_of(LayerIdx layer) const {
  const auto before = static_cast<std::size_t>(
      std::ranges::count_if(open_, [&](const Open& each) { return each.key.layer == layer; }));
  return static_cast<std::size_t>(to_int(layer)) * kRanks + std::min(before, kRanks - 1);
}

bool HintTrust::believed(std::size_t record) const {
  return together_.believed() && by_rank_[record].believed();
}

bool HintTrust::admits(LayerIdx layer) const {
  return open_.size() < kMostOpen && (demands_ >= kProbe || believed(record_of(layer)));
}

void HintTrust::began(ExpertKey key) {
  const std::size_t record = record_of(key.layer);
  if (!believed(record)) demands_ = 0;
  open_.push_back({.key = key, .record = record});
}

void HintTrust::left(ExpertKey key) {
  const auto found = std::ranges::find(open_, key, &Open::key);
  if (found == open_.end()) return;
  const Open guess = *found;
  open_.erase(found);
  judge(guess, false);
}

void HintTrust::on_demand() { demands_ = std::min(demands_ + 1, kProbe); }

void HintTrust::on_event(LayerIdx layer, std::span<const ExpertIdx> experts) {
  std::size_t kept = 0;
  for (Open& each : open_) {
    bool over = false;
    if (each.key.layer == layer) {
      const bool came_true = std::binary_search(experts.begin(), experts.end(), each.key.expert);
      over = came_true || ++each.visits >= kPatience;
      if (over) judge(each, came_true);
    }
    if (!over) open_[kept++] = each;
  }
  open_.resize(kept);
}

void HintTrust::judge(const Open& guess, bool came_true) {
  together_.judge(came_true);
  by_rank_[guess.record].judge(came_true);
}

void HintTrust::Record::judge(bool came_true_now) {
  constexpr double kKept = 1.0 - 1.0 / kMemory;
  came_true = came_true * kKept + (came_true_now ? 1.0 : 0.0);
  all = all * kKept + 1.0;
}

}  // namespace sluice
