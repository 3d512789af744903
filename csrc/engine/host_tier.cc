#include "engine/host_tier.h"

#include <algorithm>
#include <exception>
#include <limits>
#include <string>
#include <utility>

#include "base/bytes.h"
#include "base/error.h"

namespace sluice {
namespace {

/// Few arenas make few calls to pin; small ones are pinned while the rest still fills.
constexpr std::size_t kArenaBytes = std::size_t{1} << 30;

}  // namespace

HostTier::HostTier(const MemoryPlan& plan, const ExpertStore& store, std::string_view policy,
                   Device& device, Options options)
    : device_(device), options_(options), class_of_layer_(plan.class_of_layer) {
  PolicyShape shape{.num_layers = store.num_layers()};
  for (std::int32_t l = 0; l < store.num_layers(); ++l) {
    experts_of_layer_.push_back(store.layer(LayerIdx{l}).num_experts);
    slot_of_.emplace_back(static_cast<std::size_t>(experts_of_layer_.back()), kAbsent);
    shape.max_experts = std::max(shape.max_experts, experts_of_layer_.back());
  }
  std::uint64_t may_pin_bytes = options_.pinned_cap_bytes;
  for (const SizeClass& size_class : plan.classes) {
    shape.layers_served = static_cast<std::int32_t>(std::count(
        class_of_layer_.begin(), class_of_layer_.end(), static_cast<std::int32_t>(pools_.size())));
    auto& pool = pools_.emplace_back();
    if (size_class.num_slots == 0) continue;
    pool = std::make_unique<Pool>();
    pool->slot_bytes = size_class.slot_bytes;
    shape.num_slots = size_class.num_slots;
    pool->cache = std::make_unique<SlotCache>(size_class.num_slots, make_policy(policy, shape));
    const auto within_cap = static_cast<std::int32_t>(std::min<std::uint64_t>(
        may_pin_bytes / size_class.slot_bytes, static_cast<std::uint64_t>(size_class.num_slots)));
    may_pin_bytes -= static_cast<std::uint64_t>(within_cap) * size_class.slot_bytes;
    add_arenas(*pool, within_cap, true);
    add_arenas(*pool, size_class.num_slots - within_cap, false);
  }
  pin_filled();
}

HostTier::~HostTier() = default;

void HostTier::add_arenas(Pool& pool, std::int32_t num_slots, bool may_pin) {
  const auto most = static_cast<std::int32_t>(std::clamp<std::size_t>(
      kArenaBytes / pool.slot_bytes, 1, std::numeric_limits<std::int32_t>::max()));
  while (num_slots > 0) {
    const std::int32_t slots = std::min(most, num_slots);
    num_slots -= slots;
    Arena& arena = pool.arenas.emplace_back();
    arena.memory = device_.allocate_host(pool.slot_bytes * static_cast<std::size_t>(slots));
    arena.first_slot = static_cast<std::int32_t>(pool.records.size());
    arena.num_slots = slots;
    arena.may_pin = may_pin;
    const MutexLock lock(mu_);
    progress_.capacity_bytes += arena.memory.bytes();
    for (std::int32_t i = 0; i < slots; ++i) {
      pool.records.push_back(
          {.data = arena.memory.data() + static_cast<std::size_t>(i) * pool.slot_bytes,
           .arena = pool.arenas.size() - 1});
    }
  }
}

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
  const Record& record = pool.records[static_cast<std::size_t>(to_int(lease->slot()))];
  return Source{.lease = std::move(*lease),
                .data = record.data,
                .kind = pool.arenas[record.arena].pinned ? MemoryKind::kPinned : MemoryKind::kHost};
}

std::variant<HostTier::Target, Refusal> HostTier::begin_locked(ExpertKey key) {
  Pool& pool = *pool_of(key.layer);
  const auto begun = pool.cache->begin_load(key, SlotCache::Purpose::kDemand);
  if (const Refusal* const refusal = std::get_if<Refusal>(&begun)) return *refusal;
  const std::int32_t slot = to_int(std::get<SlotIdx>(begun));
  Record& record = pool.records[static_cast<std::size_t>(slot)];
  if (record.occupied) {  // evicted
    slot_of_locked(record.key) = kAbsent;
    progress_.filled_bytes -= pool.slot_bytes;
    --pool.occupied;
  }
  record.key = key;
  record.occupied = true;
  slot_of_locked(key) = slot;
  ++pool.occupied;
  return Target{.data = record.data, .last_use = std::exchange(record.last_use, {})};
}

std::variant<HostTier::Target, Refusal> HostTier::begin_load(ExpertKey key) {
  const MutexLock lock(mu_);
  return begin_locked(key);
}

std::optional<std::pair<ExpertKey, HostTier::Target>> HostTier::begin_fill() {
  const MutexLock lock(mu_);
  while (may_fill_locked()) {
    const ExpertKey key = next_fill_;
    const bool last =
        to_int(key.expert) + 1 == experts_of_layer_[static_cast<std::size_t>(to_int(key.layer))];
    next_fill_ = last ? make_key(to_int(key.layer) + 1, 0)
                      : make_key(to_int(key.layer), to_int(key.expert) + 1);
    const Pool* const pool = pool_of(key.layer);
    if (pool == nullptr || pool->occupied == pool->cache->num_slots()) continue;
    if (slot_of_locked(key) != kAbsent) continue;
    auto begun = begin_locked(key);
    if (Target* const target = std::get_if<Target>(&begun)) return std::pair(key, *target);
  }
  return std::nullopt;
}

bool HostTier::may_fill_locked() const {
  return options_.fills && std::cmp_less(to_int(next_fill_.layer), experts_of_layer_.size());
}

void HostTier::finish_load(ExpertKey key) {
  const MutexLock lock(mu_);
  Pool& pool = *pool_of(key.layer);
  pool.cache->finish_load(key);
  progress_.filled_bytes += pool.slot_bytes;
  pool.records[static_cast<std::size_t>(slot_of_locked(key))].written = true;
}

void HostTier::end_load_locked(ExpertKey key, EventHandle last_use) {
  Pool& pool = *pool_of(key.layer);
  pool.cache->fail_load(key);
  Record& record = pool.records[static_cast<std::size_t>(slot_of_locked(key))];
  record.occupied = false;
  record.last_use = last_use;
  --pool.occupied;
}

void HostTier::fail_load(ExpertKey key, EventHandle last_use) {
  const MutexLock lock(mu_);
  end_load_locked(key, last_use);
  slot_of_locked(key) = kUnreadable;
  next_fill_ = {};  // whom the pool had no room for
}

void HostTier::cancel_load(ExpertKey key, EventHandle last_use) {
  const MutexLock lock(mu_);
  end_load_locked(key, last_use);
  slot_of_locked(key) = kAbsent;
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
    if (copied != EventHandle{}) device_.release(std::exchange(record.last_use, copied));
  }
  source = {};
}

void HostTier::touch(const CacheEvent& event) { pool_of(event.layer)->cache->touch(event); }

bool HostTier::is_full_locked(const Pool& pool, const Arena& arena) const {
  // What never fills is pinned empty: staging is in use from the first load on.
  if (!options_.fills) return true;
  const bool may_fill = may_fill_locked();
  const auto first = pool.records.begin() + arena.first_slot;
  return std::all_of(first, first + arena.num_slots, [&](const Record& record) {
    return record.written || (!record.occupied && !may_fill);
  });
}

HostTier::Arena* HostTier::full_arena_locked() {
  for (const auto& pool : pools_) {
    if (!pool) continue;
    for (Arena& arena : pool->arenas) {
      if (!arena.settled && is_full_locked(*pool, arena)) return &arena;
    }
  }
  return nullptr;
}

void HostTier::pin_filled() {
  std::exception_ptr error;
  for (bool first = true;; first = false) {
    Arena* arena = nullptr;
    {
      const MutexLock lock(mu_);
      if (first && pinning_) return;
      arena = full_arena_locked();  // under one lock with the flag: who sees it set is looked after
      pinning_ = arena != nullptr;
    }
    if (arena == nullptr) break;
    try {
      settle(*arena);
    } catch (...) {
      if (!error) error = std::current_exception();
    }
  }
  if (error) std::rethrow_exception(error);
}

// Outside of the lock: the pages stay where they are, and copies from them go on through staging.
void HostTier::settle(Arena& arena) {
  bool pinned = false;
  std::exception_ptr error;
  try {
    pinned = arena.may_pin && device_.pin(arena.memory);
  } catch (...) {
    error = std::current_exception();
  }
  const MutexLock lock(mu_);
  arena.settled = true;
  arena.pinned = pinned;
  (pinned ? progress_.pinned_bytes : progress_.pageable_bytes) += arena.memory.bytes();
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
    for (Record& record : pool->records) device_.release(std::exchange(record.last_use, {}));
    pool->arenas.clear();
  }
  progress_ = {};
}

}  // namespace sluice
