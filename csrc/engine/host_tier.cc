#include "engine/host_tier.h"

#include <algorithm>
#include <string>
#include <utility>

#include "base/bytes.h"
#include "base/error.h"

namespace sluice {
namespace {

/// Few arenas make few calls to pin; small ones are pinned while the rest still fills.
constexpr std::size_t kArenaBytes = std::size_t{1} << 30;

void release_event(Device& device, EventHandle event) {
  if (event != EventHandle{}) device.release(event);
}

}  // namespace

HostTier::HostTier(const MemoryPlan& plan, const ExpertStore& store, std::string_view policy,
                   Device& device, Options options)
    : device_(device), options_(options), class_of_layer_(plan.class_of_layer) {
  PolicyShape shape{.num_layers = store.num_layers(), .max_experts = 0};
  for (std::int32_t l = 0; l < store.num_layers(); ++l) {
    experts_of_layer_.push_back(store.layer(LayerIdx{l}).num_experts);
    slot_of_.emplace_back(static_cast<std::size_t>(experts_of_layer_.back()), -1);
    shape.max_experts = std::max(shape.max_experts, experts_of_layer_.back());
  }
  for (const SizeClass& size_class : plan.classes) {
    auto& pool = pools_.emplace_back();
    if (size_class.num_slots == 0) continue;
    pool = std::make_unique<Pool>();
    pool->slot_bytes = size_class.slot_bytes;
    pool->slots_per_arena = static_cast<std::int32_t>(std::clamp<std::size_t>(
        kArenaBytes / size_class.slot_bytes, 1, static_cast<std::size_t>(size_class.num_slots)));
    pool->cache = std::make_unique<SlotCache>(size_class.num_slots, make_policy(policy, shape));
    pool->records.resize(static_cast<std::size_t>(size_class.num_slots));
    for (std::int32_t first = 0; first < size_class.num_slots; first += pool->slots_per_arena) {
      const std::int32_t slots = std::min(pool->slots_per_arena, size_class.num_slots - first);
      Arena& arena = pool->arenas.emplace_back();
      arena.memory = device_.allocate_host(size_class.slot_bytes * static_cast<std::size_t>(slots));
      // What never fills is pinned empty: staging is in use from the first load on.
      arena.unfilled = options_.fills ? slots : 0;
      progress_.capacity_bytes += arena.memory.bytes();
    }
  }
  pin_filled();
}

HostTier::~HostTier() = default;

HostTier::Pool* HostTier::pool_of(LayerIdx layer) const {
  const auto idx = class_of_layer_[static_cast<std::size_t>(to_int(layer))];
  return pools_[static_cast<std::size_t>(idx)].get();
}

std::int32_t& HostTier::slot_of_locked(ExpertKey key) {
  return slot_of_[static_cast<std::size_t>(to_int(key.layer))]
                 [static_cast<std::size_t>(to_int(key.expert))];
}

std::optional<HostTier::Source> HostTier::find(ExpertKey key) {
  const MutexLock lock(mu_);
  Pool& pool = *pool_of(key.layer);
  std::optional<SlotLease> lease = pool.cache->find(key);
  if (!lease) return std::nullopt;
  const std::int32_t slot = to_int(lease->slot());
  return Source{.lease = std::move(*lease),
                .data = pool.address(slot),
                .kind = pool.arena_of(slot).pinned ? MemoryKind::kPinned : MemoryKind::kHost};
}

std::variant<HostTier::Target, Refusal> HostTier::begin_locked(ExpertKey key) {
  Pool& pool = *pool_of(key.layer);
  const auto begun = pool.cache->begin_load(key, SlotCache::Purpose::kDemand);
  if (const Refusal* const refusal = std::get_if<Refusal>(&begun)) return *refusal;
  const std::int32_t slot = to_int(std::get<SlotIdx>(begun));
  Record& record = pool.records[static_cast<std::size_t>(slot)];
  if (record.occupied) {  // evicted
    slot_of_locked(record.key) = -1;
    progress_.filled_bytes -= pool.slot_bytes;
    --pool.occupied;
  }
  record.key = key;
  record.occupied = true;
  slot_of_locked(key) = slot;
  ++pool.occupied;
  return Target{.data = pool.address(slot), .last_use = std::exchange(record.last_use, {})};
}

std::variant<HostTier::Target, Refusal> HostTier::begin_load(ExpertKey key) {
  const MutexLock lock(mu_);
  return begin_locked(key);
}

std::optional<std::pair<ExpertKey, HostTier::Target>> HostTier::begin_fill() {
  const MutexLock lock(mu_);
  if (!options_.fills) return std::nullopt;
  while (std::cmp_less(to_int(next_fill_.layer), experts_of_layer_.size())) {
    const ExpertKey key = next_fill_;
    const bool last =
        to_int(key.expert) + 1 == experts_of_layer_[static_cast<std::size_t>(to_int(key.layer))];
    next_fill_ = last ? make_key(to_int(key.layer) + 1, 0)
                      : make_key(to_int(key.layer), to_int(key.expert) + 1);
    const Pool* const pool = pool_of(key.layer);
    if (pool == nullptr || pool->occupied == pool->cache->num_slots()) continue;
    auto begun = begin_locked(key);
    if (Target* const target = std::get_if<Target>(&begun)) return std::pair(key, *target);
  }
  return std::nullopt;
}

void HostTier::finish_load(ExpertKey key) {
  const MutexLock lock(mu_);
  Pool& pool = *pool_of(key.layer);
  pool.cache->finish_load(key);
  progress_.filled_bytes += pool.slot_bytes;
  const std::int32_t slot = slot_of_locked(key);
  Record& record = pool.records[static_cast<std::size_t>(slot)];
  if (!std::exchange(record.written, true)) {
    Arena& arena = pool.arena_of(slot);
    if (arena.unfilled > 0) --arena.unfilled;
  }
}

void HostTier::fail_load(ExpertKey key, EventHandle last_use) {
  const MutexLock lock(mu_);
  Pool& pool = *pool_of(key.layer);
  pool.cache->fail_load(key);
  Record& record = pool.records[static_cast<std::size_t>(slot_of_locked(key))];
  record.occupied = false;
  record.last_use = last_use;
  slot_of_locked(key) = -1;
  --pool.occupied;
  next_fill_ = std::min(next_fill_, key);
}

bool HostTier::is_loading(ExpertKey key) const {
  return pool_of(key.layer)->cache->state(key) == SlotState::kLoading;
}

void HostTier::give_back(ExpertKey key, Source& source, EventHandle copied) {
  {
    const MutexLock lock(mu_);
    Record& record =
        pool_of(key.layer)->records[static_cast<std::size_t>(to_int(source.lease.slot()))];
    // One stream copies: what is behind the newer copy is behind the older one.
    if (copied != EventHandle{}) release_event(device_, std::exchange(record.last_use, copied));
  }
  source = {};
}

void HostTier::touch(const CacheEvent& event) { pool_of(event.layer)->cache->touch(event); }

void HostTier::pin_filled() {
  for (const auto& pool : pools_) {
    if (!pool) continue;
    for (Arena& arena : pool->arenas) {
      {
        const MutexLock lock(mu_);
        if (arena.settled || arena.unfilled > 0 || pinning_) continue;
        pinning_ = true;
      }
      settle(arena);
    }
  }
}

// Outside of the lock: the pages stay where they are, and copies from them go on through staging.
void HostTier::settle(Arena& arena) {
  const std::size_t bytes = arena.memory.bytes();
  bool pinned = false;
  std::exception_ptr error;
  bool within_cap = false;
  {
    const MutexLock lock(mu_);
    within_cap = progress_.pinned_bytes + bytes <= options_.pinned_cap_bytes;
  }
  try {
    pinned = within_cap && device_.pin(arena.memory);
  } catch (...) {
    error = std::current_exception();
  }
  const MutexLock lock(mu_);
  pinning_ = false;
  arena.settled = true;
  arena.pinned = pinned;
  (pinned ? progress_.pinned_bytes : progress_.pageable_bytes) += bytes;
  if (error) std::rethrow_exception(error);
}

HostTierProgress HostTier::progress() const {
  const MutexLock lock(mu_);
  return progress_;
}

void HostTier::close() {
  const MutexLock lock(mu_);
  for (const auto& pool : pools_) {
    if (!pool) continue;
    pool->cache->evict_all();
    for (Record& record : pool->records) release_event(device_, std::exchange(record.last_use, {}));
    pool->arenas.clear();
  }
  progress_ = {};
}

}  // namespace sluice
