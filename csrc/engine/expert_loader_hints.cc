// The part of the loader that concerns guesses: law 4 says that they never block and never
// change results, so each of them may be refused here at any time.
#include <algorithm>
#include <cmath>
#include <new>
#include <string>
#include <utility>
#include <vector>

#include "base/error.h"
#include "engine/expert_loader.h"

namespace sluice {
namespace {

/// Whether `a` should lose its slot before `b`: further ahead, then less probable, then later.
bool is_less_valuable(const SlotRecord& a, const SlotRecord& b) {
  if (a.priority != b.priority) return a.priority > b.priority;
  if (a.probability != b.probability) return a.probability < b.probability;
  return a.deadline > b.deadline;
}

}  // namespace

void ExpertLoader::hint(std::span<const Hint> hints) {
  {
    const MutexLock lock(mu_);
    // First, so that what is late lends newer guesses no place and no probability.
    stats_.hints_dropped += hints_.drop_late(clock_.now(), load_time_);
    for (const Hint& hint : hints) {
      ++stats_.hints;
      // A probability that is no number, or none at all, is no guess; who is here needs none.
      if (paused_ || !lives_in_slots(hint.key) || !(hint.probability > 0) ||
          slot_of_locked(hint.key) >= 0) {
        ++stats_.hints_dropped;
      } else {
        stats_.hints_dropped += hints_.push(hint);
      }
    }
    feed_hints_locked();
  }
  step();
}

void ExpertLoader::hint_absent(std::vector<Hint>& hints) {
  {
    const MutexLock lock(mu_);
    std::erase_if(hints, [&](const Hint& each) REQUIRES(mu_) {
      return !lives_in_slots(each.key) || slot_of_locked(each.key) >= 0;
    });
  }
  hint(hints);
}

void ExpertLoader::publish(LayerIdx first_layer, std::span<const float> scores,
                           std::int64_t age_steps) {
  const auto width = static_cast<std::size_t>(max_experts_);
  const std::size_t num_rows = scores.size() / width;
  const std::int32_t first = to_int(first_layer);
  const std::int32_t num_layers = store_->num_layers();
  require<ConfigError>(scores.size() == num_rows * width && first >= 0 && first <= num_layers &&
                           std::cmp_less_equal(num_rows, num_layers - first),
                       [&] {
                         return "forecast: got " + std::to_string(scores.size()) +
                                " keep-scores from layer " + std::to_string(first) +
                                " on, expected rows of " + std::to_string(width) +
                                " for layers below " + std::to_string(num_layers);
                       });
  ForecastRows rows{.step = -age_steps, .first_layer = first_layer, .scores = scores};
  {
    const MutexLock lock(mu_);
    rows.step += step_;
  }
  for (const auto& pool : pools_) {
    if (pool) pool->cache.publish(rows);
  }
}

bool ExpertLoader::lives_in_slots(ExpertKey key) const {
  const std::int32_t layer = to_int(key.layer);
  const std::int32_t expert = to_int(key.expert);
  return layer >= 0 && layer < store_->num_layers() && expert >= 0 &&
         expert < store_->layer(key.layer).num_experts && class_has_slots(key.layer);
}

bool ExpertLoader::class_has_slots(LayerIdx layer) const {
  const auto idx = class_of_layer_[static_cast<std::size_t>(to_int(layer))];
  return pools_[static_cast<std::size_t>(idx)] != nullptr;
}

void ExpertLoader::feed_hints_locked() {
  const std::int32_t room = path_->hint_room();
  stats_.hints_dropped += hints_.drop_late(clock_.now(), load_time_);
  // Demands first, those without a slot and those on their way: while the link is busy with them a
  // guess would only take a slot from somebody sooner.
  while (!hints_.empty() && !paused_ && unplaced_ == 0 && loads_in_flight_ == hints_in_flight_ &&
         hints_in_flight_ < room) {
    if (!take_hint_locked(hints_.front())) return;
    hints_.pop();
  }
}

bool ExpertLoader::take_hint_locked(const Hint& hint) {
  // Here already, on its way, or just being reported: worth nothing.
  if (slot_of_locked(hint.key) >= 0 || path_->in_flight(hint.key)) {
    ++stats_.hints_dropped;
    return true;
  }
  if (!trust_.admits(hint.key.layer)) {
    ++stats_.hints_distrusted;
    ++stats_.hints_dropped;
    return true;
  }
  SlotPool& pool = pool_of(hint.key.layer);
  const auto begun = pool.cache.begin_load(hint.key, SlotCache::Purpose::kHint);
  if (const Refusal* refusal = std::get_if<Refusal>(&begun)) {
    if (*refusal == Refusal::kLeased || *refusal == Refusal::kDeferred) return false;
    ++stats_.hints_dropped;
    return true;
  }
  const std::int32_t num_layers = store_->num_layers();
  const bool next = to_int(hint.key.layer) == (to_int(layer_) + 1) % num_layers;
  try {
    submit_locked(pool, std::get<SlotIdx>(begun),
                  {.key = hint.key,
                   .priority = next ? Priority::kNextLayer : Priority::kFurtherAhead,
                   .probability = hint.probability,
                   .deadline = hint.deadline},
                  -1);
    trust_.began(hint.key);
  } catch (const std::bad_alloc&) {
    ++stats_.hints_dropped;
  }
  return true;
}

bool ExpertLoader::cancel_least_hint(LayerIdx layer, std::int32_t wanted) {
  ExpertKey key{};
  {
    const MutexLock lock(mu_);
    SlotRecord* least = nullptr;
    std::int32_t ending = 0;
    for (SlotRecord& record : pool_of(layer).records) {
      if (!record.loading || !record.by_hint || record.asked) continue;
      if (record.cancelled) {
        ++ending;
      } else if (least == nullptr || is_less_valuable(record, *least)) {
        least = &record;
      }
    }
    if (least == nullptr || ending >= wanted) return false;
    least->cancelled = true;
    key = least->key;
  }
  path_->cancel(key);
  return true;
}

void ExpertLoader::drain() {
  std::vector<ExpertKey> loads;
  {
    const MutexLock lock(mu_);
    paused_ = true;
    stats_.hints_dropped += hints_.clear();
    for (const auto& pool : pools_) {
      if (!pool) continue;
      for (SlotRecord& record : pool->records) {
        if (!record.loading || record.waiter >= 0) continue;
        record.cancelled = true;
        loads.push_back(record.key);
      }
    }
  }
  const auto go_on = [this] {
    const MutexLock lock(mu_);
    paused_ = false;
  };
  try {
    for (const ExpertKey key : loads) path_->cancel(key);
    wait_until_idle();
  } catch (...) {
    go_on();
    throw;
  }
  go_on();
}

}  // namespace sluice
