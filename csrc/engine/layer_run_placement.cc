// The part of a layer's run that gives slots to misses: the free ones, the ring's, and those of
// guesses.
#include <optional>
#include <utility>

#include "engine/layer_run.h"

namespace sluice {

// Gives slots to misses, in order, as long as there are any.
void LayerRun::place_all() {
  retry_soon_ = false;
  bool started = false;
  std::size_t kept = 0;
  bool full = false;
  for (std::size_t i = 0; i < unplaced_.size(); ++i) {
    const std::int32_t idx = unplaced_[i];
    const auto remaining = static_cast<std::int32_t>(unplaced_.size() - i);
    const auto placement = full ? ExpertLoader::Placement::kNoSlot : place_one(idx, remaining);
    if (placement == ExpertLoader::Placement::kNoSlot) full = true;
    if (placement == ExpertLoader::Placement::kNotYet) retry_soon_ = true;
    if (placement == ExpertLoader::Placement::kNoSlot ||
        placement == ExpertLoader::Placement::kNotYet) {
      unplaced_[kept++] = idx;
    } else {
      started = true;
    }
  }
  unplaced_.resize(kept);
  if (started) parts_.loader.step();
}

ExpertLoader::Placement LayerRun::place_one(std::int32_t idx, std::int32_t num_waiting) {
  ExpertLoader& loader = parts_.loader;
  Need& each = need(idx);
  for (;;) {
    RingSlot* reused = nullptr;
    if (has_ring_ && ring_.size() >= ring_limit_ && !loader.has_empty_slot(args_->layer)) {
      reused = idle_ring_slot();
      if (reused == nullptr) return ExpertLoader::Placement::kNoSlot;
    }
    ExpertLoader::Placed placed =
        loader.place(key_of(each), idx, reused ? std::optional(reused->slot) : std::nullopt);
    switch (placed.what) {
      case ExpertLoader::Placement::kReady:
        mark_ready(idx, std::move(placed.grant));
        break;
      case ExpertLoader::Placement::kStarted:
        if (reused != nullptr) {
          reused->need = idx;
        } else if (has_ring_ && !placed.was_empty) {
          ring_.push_back({.slot = placed.slot, .need = idx});
        }
        [[fallthrough]];
      case ExpertLoader::Placement::kJoined:
        each.state = Need::State::kLoading;
        each.slot = placed.slot;
        break;
      case ExpertLoader::Placement::kNoSlot:
        if (reused != nullptr) {  // somebody else holds it now: the ring may take another
          ring_.erase(ring_.begin() + (reused - ring_.data()));
          continue;
        }
        // Guesses make room for demands, one each.
        if (loader.cancel_least_hint(args_->layer, num_waiting)) continue;
        break;
      case ExpertLoader::Placement::kNotYet:
        break;
    }
    return placed.what;
  }
}

// The next ring slot, in turn, whose expert this call is done with.
LayerRun::RingSlot* LayerRun::idle_ring_slot() {
  for (std::size_t i = 0; i < ring_.size(); ++i) {
    RingSlot& candidate = ring_[(ring_next_ + i) % ring_.size()];
    const Need& user = need(candidate.need);
    const bool busy = user.slot == candidate.slot &&
                      (user.state == Need::State::kLoading || user.state == Need::State::kReady);
    if (busy) continue;
    ring_next_ = (ring_next_ + i + 1) % ring_.size();
    return &candidate;
  }
  return nullptr;
}

}  // namespace sluice
