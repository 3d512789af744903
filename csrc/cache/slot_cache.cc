#include "cache/slot_cache.h"

#include <string>
#include <utility>

#include "base/error.h"

namespace sluice {
namespace {

std::size_t checked_num_slots(std::int32_t num_slots) {
  require<CapacityError>(num_slots > 0, [&] {
    return "slot cache: got " + std::to_string(num_slots) +
           " slots, expected at least 1; raise device_memory to one slot per size class";
  });
  return static_cast<std::size_t>(num_slots);
}

}  // namespace

SlotLease::SlotLease(SlotLease&& other) noexcept
    : cache_(std::exchange(other.cache_, nullptr)), slot_(other.slot_) {}

SlotLease& SlotLease::operator=(SlotLease&& other) noexcept {
  if (this != &other) {
    reset();
    cache_ = std::exchange(other.cache_, nullptr);
    slot_ = other.slot_;
  }
  return *this;
}

SlotLease::~SlotLease() { reset(); }

void SlotLease::reset() noexcept {
  if (SlotCache* const cache = std::exchange(cache_, nullptr)) cache->release(slot_);
}

SlotCache::SlotCache(std::int32_t num_slots, std::unique_ptr<Policy> policy)
    : num_slots_(num_slots),
      policy_(std::move(policy)),
      slots_(checked_num_slots(num_slots)),
      slot_of_(&nodes_) {
  require<InternalError>(policy_ != nullptr, [] {
    return std::string("slot cache: got no policy, expected one from make_policy");
  });
  // All memory now: the pool keeps what is given back.
  slot_of_.reserve(slots_.size());
  for (std::int32_t i = 0; i < num_slots; ++i) slot_of_.emplace(make_key(-1, i), SlotIdx{});
  slot_of_.clear();
  candidates_.reserve(slots_.size());
}

SlotCache::~SlotCache() = default;

std::optional<SlotLease> SlotCache::find(ExpertKey key) {
  MutexLock lock(mu_);
  const auto found = slot_of_.find(key);
  if (found == slot_of_.end()) return std::nullopt;
  SlotView& slot = slot_locked(found->second);
  if (slot.state != SlotState::kReady) return std::nullopt;
  ++slot.leases;
  ++num_leases_;
  return SlotLease(this, found->second);
}

SlotState SlotCache::state(ExpertKey key) const {
  MutexLock lock(mu_);
  const auto found = slot_of_.find(key);
  if (found == slot_of_.end()) return SlotState::kEmpty;
  return slots_[static_cast<std::size_t>(to_int(found->second))].state;
}

std::variant<SlotIdx, Refusal> SlotCache::begin_load(ExpertKey key, Purpose purpose,
                                                     std::optional<SlotIdx> pinned_to) {
  MutexLock lock(mu_);
  if (const auto found = slot_of_.find(key); found != slot_of_.end()) {
    const bool ready = slot_locked(found->second).state == SlotState::kReady;
    return ready ? Refusal::kResident : Refusal::kLoading;
  }
  const auto choice = choose_slot_locked(key, purpose, pinned_to);
  if (const SlotIdx* const slot = std::get_if<SlotIdx>(&choice)) {
    if (slot_locked(*slot).state == SlotState::kReady) evict_locked(*slot);
    policy_->on_load(key, purpose == Purpose::kHint);
    slot_of_.emplace(key, *slot);
    slot_locked(*slot) = {.state = SlotState::kLoading, .key = key, .leases = 0};
  }
  return choice;
}

std::variant<SlotIdx, Refusal> SlotCache::choose_slot_locked(ExpertKey key, Purpose purpose,
                                                             std::optional<SlotIdx> pinned_to) {
  candidates_.clear();
  if (pinned_to) (void)slot_locked(*pinned_to);  // in range, or InternalError
  const std::int32_t first = pinned_to ? to_int(*pinned_to) : 0;
  const std::int32_t last = pinned_to ? first + 1 : num_slots_;
  for (std::int32_t i = first; i < last; ++i) {
    const SlotView& slot = slot_locked(SlotIdx{i});
    if (slot.state == SlotState::kEmpty) return SlotIdx{i};
    consider_locked(SlotIdx{i});
  }
  if (candidates_.empty()) return Refusal::kLeased;
  const Candidate victim = choose_victim_locked();
  if (purpose == Purpose::kHint && !policy_->admits_hint(key, victim.key)) {
    return policy_->hints_wait() ? Refusal::kDeferred : Refusal::kDeclined;
  }
  return victim.slot;
}

void SlotCache::consider_locked(SlotIdx slot) {
  const SlotView& view = slot_locked(slot);
#if defined(SLUICE_PLANT_I7)
  if (view.state == SlotState::kReady)
#else
  if (view.state == SlotState::kReady && view.leases == 0)
#endif
    candidates_.push_back({.slot = slot, .key = view.key});
}

Candidate SlotCache::choose_victim_locked() {
  const std::size_t num_candidates = candidates_.size();
  const std::size_t choice = policy_->victim(candidates_);
  require<InternalError>(choice < num_candidates, [&] {
    return "policy: got victim " + std::to_string(choice) + ", expected one of " +
           std::to_string(num_candidates) + " candidates";
  });
  return candidates_[choice];
}

void SlotCache::finish_load(ExpertKey key) {
  MutexLock lock(mu_);
  slot_locked(loading_slot_locked(key, "finish_load")).state = SlotState::kReady;
}

void SlotCache::fail_load(ExpertKey key) {
  MutexLock lock(mu_);
  const SlotIdx slot = loading_slot_locked(key, "fail_load");
#if defined(SLUICE_PLANT_I6_SLOT)
  slot_locked(slot).state = SlotState::kReady;
#else
  slot_of_.erase(key);
  slot_locked(slot) = {};
  policy_->on_evict(key);
#endif
}

void SlotCache::touch(const CacheEvent& event) {
  MutexLock lock(mu_);
  policy_->on_event(event);
}

void SlotCache::publish(const ForecastRows& rows) {
  MutexLock lock(mu_);
  policy_->on_forecast(rows);
}

std::int32_t SlotCache::trim(std::int32_t num_kept) {
  MutexLock lock(mu_);
  std::int32_t evicted = 0;
  while (static_cast<std::int64_t>(slot_of_.size()) > num_kept) {
    candidates_.clear();
    for (std::int32_t i = 0; i < num_slots_; ++i) consider_locked(SlotIdx{i});
    if (candidates_.empty()) break;
    evict_locked(choose_victim_locked().slot);
    ++evicted;
  }
  return evicted;
}

std::int32_t SlotCache::evict_all() {
  MutexLock lock(mu_);
  std::int32_t evicted = 0;
  for (std::int32_t i = 0; i < num_slots_; ++i) {
    const SlotView& slot = slot_locked(SlotIdx{i});
    if (slot.state != SlotState::kReady || slot.leases != 0) continue;
    evict_locked(SlotIdx{i});
    ++evicted;
  }
  return evicted;
}

std::int32_t SlotCache::num_leases() const {
  MutexLock lock(mu_);
  return num_leases_;
}

std::vector<SlotCache::SlotView> SlotCache::snapshot() const {
  MutexLock lock(mu_);
  return slots_;
}

void SlotCache::release(SlotIdx slot) noexcept {
  MutexLock lock(mu_);
  --slots_[static_cast<std::size_t>(to_int(slot))].leases;
  --num_leases_;
}

SlotCache::SlotView& SlotCache::slot_locked(SlotIdx slot) {
  require<InternalError>(to_int(slot) >= 0 && to_int(slot) < num_slots_, [&] {
    return "slot cache: got slot " + std::to_string(to_int(slot)) + ", expected one below " +
           std::to_string(num_slots_);
  });
  return slots_[static_cast<std::size_t>(to_int(slot))];
}

SlotIdx SlotCache::loading_slot_locked(ExpertKey key, const char* verb) {
  const auto found = slot_of_.find(key);
  const bool absent = found == slot_of_.end();
  require<InternalError>(!absent && slot_locked(found->second).state == SlotState::kLoading, [&] {
    return std::string(verb) + ": got " + describe(key) + ", which is " +
           (absent ? "not in the cache" : "ready") + ", expected one that is loading";
  });
  return found->second;
}

void SlotCache::evict_locked(SlotIdx slot) {
  SlotView& view = slot_locked(slot);
  const ExpertKey key = view.key;
  slot_of_.erase(key);
  view = {};
  policy_->on_evict(key);
}

}  // namespace sluice
