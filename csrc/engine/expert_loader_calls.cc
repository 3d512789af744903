// The part of the loader that concerns one call: who is ready, late or missing when it
// begins, slots for what is missing, landings, and its end.
#include <algorithm>
#include <iterator>
#include <string>
#include <utility>

#include "base/error.h"
#include "engine/expert_loader.h"

namespace sluice {

void ExpertLoader::begin_call(LayerIdx layer, std::span<const ExpertIdx> experts,
                              std::span<const std::int32_t> needs, std::span<Grant> grants,
                              std::span<Judgement> judged, std::span<const std::int64_t> tokens,
                              std::int64_t num_tokens) {
  const MutexLock lock(mu_);
  if (broken_) std::rethrow_exception(broken_);
  if (layer <= layer_) ++step_;
  layer_ = layer;
  ++call_;
  call_waves_ = 1;
  first_demand_ = 0;
  last_landing_ = 0;
  if (experts.empty()) return;
  SlotPool& pool = pool_of(layer);
  pool.cache.touch({.step = step_,
                    .layer = layer,
                    .experts = experts,
                    .tokens = tokens,
                    .num_tokens = num_tokens});
  trust_.on_event(layer, experts);
  stats_.requests += static_cast<std::int64_t>(experts.size());
  for (std::size_t i = 0; i < experts.size(); ++i) {
    const ExpertKey key{layer, experts[i]};
    const std::int32_t slot = slot_of_locked(key);
    if (slot < 0) {
      judged[i] = Judgement::kMiss;
      ++stats_.misses;
      ++unplaced_;
    } else if (pool.record(SlotIdx{slot}).loading) {
      judged[i] = Judgement::kLate;
      ++stats_.late;
      join_locked(key, pool.record(SlotIdx{slot}), needs[i]);
    } else {
      judged[i] = Judgement::kHit;
      ++stats_.hits;
      ask_for_locked(pool.record(SlotIdx{slot}));
      grants[i] = grant_resident_locked(pool, key);
    }
  }
}

Grant ExpertLoader::grant_locked(SlotPool& pool, SlotLease lease) {
  SlotRecord& record = pool.record(lease.slot());
  if (record.call != call_) {
    record.call = call_;
    record.wave = 1;
  }
  const SlotIdx slot = lease.slot();
  return {.lease = std::move(lease), .data = pool.address(slot), .ready = record.ready};
}

Grant ExpertLoader::grant_resident_locked(SlotPool& pool, ExpertKey key) {
  SlotLease lease = *pool.cache.find(key);
  SlotRecord& record = pool.record(lease.slot());
  if (record.ready != EventHandle{} && device_.passed(record.ready)) {
    device_.release(std::exchange(record.ready, {}));
  }
  return grant_locked(pool, std::move(lease));
}

ExpertLoader::Placed ExpertLoader::place(ExpertKey key, std::int32_t need,
                                         std::optional<SlotIdx> pinned_to) {
  const MutexLock lock(mu_);
  SlotPool& pool = pool_of(key.layer);
  if (const std::int32_t held = slot_of_locked(key); held >= 0) {
    SlotRecord& record = pool.record(SlotIdx{held});
    --unplaced_;
    if (record.loading) {
      join_locked(key, record, need);
      return {.what = Placement::kJoined, .slot = SlotIdx{held}, .was_empty = false, .grant = {}};
    }
    ask_for_locked(record);
    return {.what = Placement::kReady,
            .slot = SlotIdx{held},
            .was_empty = false,
            .grant = grant_resident_locked(pool, key)};
  }
  // The slot of its last load is free already, but the transfer engine has not forgotten it yet: a
  // load submitted now would share that ticket and never start.
  if (path_->in_flight(key))
    return {.what = Placement::kNotYet, .slot = {}, .was_empty = false, .grant = {}};

  const auto begun = pool.cache.begin_load(key, SlotCache::Purpose::kDemand, pinned_to);
  if (const Refusal* refusal = std::get_if<Refusal>(&begun)) {
    require<InternalError>(*refusal == Refusal::kLeased, [&] {
      return "demand: got refusal " + std::to_string(static_cast<int>(*refusal)) +
             " of an expert that holds no slot, expected kLeased";
    });
    return {.what = Placement::kNoSlot, .slot = {}, .was_empty = false, .grant = {}};
  }
  --unplaced_;
  const SlotIdx slot = std::get<SlotIdx>(begun);
  const bool was_empty = !pool.record(slot).occupied;
  if (first_demand_ == 0) first_demand_ = clock_.now();
  submit_locked(pool, slot, {.key = key, .priority = Priority::kDemand}, need);
  return {.what = Placement::kStarted, .slot = slot, .was_empty = was_empty, .grant = {}};
}

void ExpertLoader::take_landings(std::vector<Landing>& landings) {
  const MutexLock lock(mu_);
  std::move(landings_.begin(), landings_.end(), std::back_inserter(landings));
  landings_.clear();
}

std::uint64_t ExpertLoader::epoch() const {
  const MutexLock lock(mu_);
  return epoch_;
}

bool ExpertLoader::may_end(std::uint64_t seen) const {
  const MutexLock lock(mu_);
  if (broken_) std::rethrow_exception(broken_);
  return loads_in_flight_ > 0 || epoch_ != seen;
}

void ExpertLoader::wait(std::uint64_t seen, std::chrono::nanoseconds slice) {
  {
    const MutexLock lock(mu_);
    if (broken_) std::rethrow_exception(broken_);
  }
  wait_for_end(seen, slice);
}

void ExpertLoader::wait_for_end(std::uint64_t seen, std::chrono::nanoseconds slice) {
  {
    const MutexLock lock(mu_);
    if (epoch_ != seen) return;
    if (!drive_) {
      ended_.wait_for(mu_, slice);
      return;
    }
  }
  drive_();
}

void ExpertLoader::give_back(std::span<Grant> grants, LayerIdx layer, StreamHandle stream) {
  struct End {  // outside of the lock, which the cache's is taken inside of
    std::span<Grant> grants;
    ~End() {
      for (Grant& grant : grants) grant = {};
    }
  };
  const End end{grants};
  if (grants.empty()) return;
  const MutexLock lock(mu_);
  const EventHandle used = device_.record(stream);
  device_.share(used, static_cast<int>(grants.size()) - 1);
#if defined(SLUICE_PLANT_I1)
  // planted: written while kReady
  for (const Grant& grant : grants) const_cast<std::byte*>(grant.data)[0] ^= std::byte{1};
#elif defined(SLUICE_PLANT_I4)
  device_.synchronize(used);  // planted: the lease lasts until the kernel has finished
#endif
  for (const Grant& grant : grants) {
    SlotRecord& record = pool_of(layer).record(grant.lease.slot());
    device_.release(std::exchange(record.last_use, {}));
    record.last_use = used;
  }
}

void ExpertLoader::finish_call_locked(const CallReport& report) {
  unplaced_ = 0;
  ++stats_.forwards;
  stats_.tokens += report.num_tokens;
  stats_.requests += report.in_place_hits;
  stats_.hits += report.in_place_hits;
  stats_.waves += call_waves_;
  stats_.stall_ns += report.stall_ns;
  stats_.compute_ns += report.compute_ns;
  stats_.generic_gate_calls += report.generic_gate_calls;
  scorers_lost_ = report.scorers_lost;
  if (first_demand_ != 0 && last_landing_ > first_demand_) {
    stats_.demand_ns += last_landing_ - first_demand_;
  }
  feed_hints_locked();
}

void ExpertLoader::end_call(const CallReport& report) {
  {
    const MutexLock lock(mu_);
    if (!report.streamed && call_waves_ > 1) ++waves_at_decode_;
    finish_call_locked(report);
  }
  step();
}

void ExpertLoader::abandon_call(const CallReport& report) {
  abandoned_.clear();
  {
    const MutexLock lock(mu_);
    for (const auto& pool : pools_) {
      if (!pool) continue;
      for (SlotRecord& record : pool->records) {
        if (record.waiter < 0) continue;
        record.waiter = -1;
        record.cancelled = true;
        abandoned_.push_back(record.key);
      }
    }
    landings_.swap(dropped_);
    finish_call_locked(report);
  }
  dropped_.clear();  // leases end outside of the lock
  for (const ExpertKey key : abandoned_) path_->cancel(key, true);
  step();
}

}  // namespace sluice
