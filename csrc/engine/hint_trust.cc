#include "engine/hint_trust.h"

#include <algorithm>

namespace sluice {

bool HintTrust::believed() const { return all_ < kFirst || true_ >= kBreakEven * all_; }

bool HintTrust::admits() const {
  return open_.size() < kMostOpen && (believed() || demands_ >= kProbe);
}

void HintTrust::began(ExpertKey key) {
  if (!believed()) demands_ = 0;
  open_.push_back({.key = key, .visits = 0});
}

void HintTrust::left(ExpertKey key) {
  const auto found =
      std::find_if(open_.begin(), open_.end(), [&](const Open& each) { return each.key == key; });
  if (found == open_.end()) return;
  open_.erase(found);
  judge(false);
}

void HintTrust::on_demand() { demands_ = std::min(demands_ + 1, kProbe); }

void HintTrust::on_event(LayerIdx layer, std::span<const ExpertIdx> experts) {
  std::size_t kept = 0;
  for (Open& each : open_) {
    bool over = false;
    if (each.key.layer == layer) {
      const bool came_true = std::binary_search(experts.begin(), experts.end(), each.key.expert);
      over = came_true || ++each.visits >= kPatience;
      if (over) judge(came_true);
    }
    if (!over) open_[kept++] = each;
  }
  open_.resize(kept);
}

void HintTrust::judge(bool came_true) {
  constexpr double kKept = 1.0 - 1.0 / kMemory;
  true_ = true_ * kKept + (came_true ? 1.0 : 0.0);
  all_ = all_ * kKept + 1.0;
}

}  // namespace sluice
