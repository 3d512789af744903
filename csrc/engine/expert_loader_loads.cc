// The part of the loader that concerns loads: begun, joined, ended, and what they cost.
#include <algorithm>
#include <string>
#include <utility>

#include "base/error.h"
#include "engine/expert_loader.h"

namespace sluice {
namespace {

SpanKind kind_of(const SlotRecord& record) {
  return record.by_hint ? SpanKind::kLoadHint : SpanKind::kLoadDemand;
}

}  // namespace

// A guess comes true: its bytes change their name.
void ExpertLoader::ask_for_locked(SlotRecord& record) {
  if (!record.by_hint || record.asked) return;
  record.asked = true;
  if (record.loading) {
    --hints_in_flight_;
  } else {
    stats_.bytes_read_hint_pending -= record.bytes_read;
    stats_.bytes_read_hint_used += record.bytes_read;
  }
}

void ExpertLoader::join_locked(ExpertKey key, SlotRecord& record, std::int32_t need) {
  ask_for_locked(record);
  record.waiter = need;
  record.cancelled = false;
  record.priority = Priority::kDemand;
  if (first_demand_ == 0) first_demand_ = clock_.now();
  path_->promote(key, Priority::kDemand);
}

// The cache has just given `slot` to the request's expert.
void ExpertLoader::submit_locked(SlotPool& pool, SlotIdx slot, const LoadRequest& request,
                                 std::int32_t need) {
  SlotRecord& record = pool.record(slot);
  if (record.occupied) {
    ++stats_.evictions;
    vacate_locked(pool, record);
  }
  const std::int32_t wave = need < 0 || record.call != call_ ? 1 : record.wave + 1;
  if (need >= 0) call_waves_ = std::max(call_waves_, wave);
  LoadRequest load = request;
  load.slot = pool.address(slot);
  load.last_use = std::exchange(record.last_use, {});
#if defined(SLUICE_PLANT_I2)
  device_.release(std::exchange(load.last_use, {}));  // planted: the writer waits for nobody
#endif
  record = {.key = load.key,
            .occupied = true,
            .loading = true,
            .by_hint = is_hint(load.priority),
            .waiter = need,
            .priority = load.priority,
            .probability = load.probability,
            .deadline = load.deadline,
            .submitted_at = clock_.now(),
            .call = need < 0 ? record.call : call_,
            .wave = need < 0 ? record.wave : wave};
  slot_of_locked(load.key) = to_int(slot);
  ++pool.occupied;
  ++loads_in_flight_;
  if (record.by_hint) {
    ++hints_in_flight_;
  } else {
    trust_.on_demand();
  }
  stats_.resident_bytes += pool.slot_bytes;
  stats_.peak_resident_bytes = std::max(stats_.peak_resident_bytes, stats_.resident_bytes);
  try {
    path_->submit(load);
  } catch (...) {  // no memory: a load that nobody carries would never end
    pool.cache.fail_load(load.key);
    --loads_in_flight_;
    if (record.by_hint) --hints_in_flight_;
    vacate_locked(pool, record);
    record.waiter = -1;
    record.last_use = load.last_use;
    throw;
  }
  record.shown = timeline_.show(kind_of(record), load.key);  // once it is on its way: it will end
}

// An expert leaves its slot: evicted, or its load came to nothing.
void ExpertLoader::vacate_locked(SlotPool& pool, SlotRecord& record) {
  if (record.by_hint && !record.asked) trust_.left(record.key);
  if (record.by_hint && !record.asked && !record.loading) {
    stats_.bytes_read_hint_pending -= record.bytes_read;
    stats_.bytes_read_hint_wasted += record.bytes_read;
  }
  slot_of_locked(record.key) = -1;
  record.occupied = false;
  record.loading = false;
  device_.release(std::exchange(record.ready, {}));
  --pool.occupied;
  stats_.resident_bytes -= pool.slot_bytes;
}

void ExpertLoader::account_locked(const SlotRecord& record, TicketState state,
                                  std::uint64_t bytes_read) {
  stats_.bytes_read += bytes_read;
  if (!record.by_hint) {
    stats_.bytes_read_demand += bytes_read;
  } else if (state != TicketState::kDone) {
    stats_.bytes_read_hint_wasted += bytes_read;
    ++stats_.hints_dropped;
  } else if (record.asked) {
    stats_.bytes_read_hint_used += bytes_read;
  } else {
    stats_.bytes_read_hint_pending += bytes_read;
  }
}

void ExpertLoader::finished(const LoadRequest& request, TicketState state, std::exception_ptr error,
                            std::uint64_t bytes_read) {
  const MutexLock lock(mu_);
  const Nanos now = clock_.now();
  SlotPool& pool = pool_of(request.key.layer);
  const SlotIdx slot{slot_of_locked(request.key)};
  require<InternalError>(to_int(slot) >= 0 && pool.record(slot).loading, [&] {
    return "finished: got " + describe(request.key) + ", expected one that is loading";
  });
  SlotRecord& record = pool.record(slot);
  EventHandle last_use = request.last_use;
  EventHandle ready{};
  try {
    if (state == TicketState::kDone) ready = device_.record(device_.copy_stream());
  } catch (const DeviceError&) {  // without the event nobody may read it
    state = TicketState::kFailed;
    error = std::current_exception();
  }
  --loads_in_flight_;
  if (record.by_hint && !record.asked) --hints_in_flight_;
  account_locked(record, state, bytes_read);
  timeline_.hide(record.shown);
  timeline_.add({.kind = kind_of(record),
                 .begin = record.submitted_at,
                 .end = now,
                 .key = request.key,
                 .bytes = bytes_read,
                 .tokens = 0});
  const std::int32_t waiter = std::exchange(record.waiter, -1);
  if (state == TicketState::kDone) {
    pool.cache.finish_load(request.key);
    record.loading = false;
    record.bytes_read = bytes_read;
    record.ready = ready;
    const Nanos took = now - std::max(record.submitted_at, std::exchange(last_end_, now));
    load_time_ = load_time_ == 0 ? took : load_time_ + (took - load_time_) / 8;
    device_.release(std::exchange(last_use, {}));
  } else {
    pool.cache.fail_load(request.key);
    vacate_locked(pool, record);
    record.last_use = last_use;  // perhaps nobody has waited for it: the next writer will (I2)
  }
  if (waiter >= 0) {
    last_landing_ = now;
    Landing landing{.need = waiter, .state = state, .grant = {}, .error = error};
    if (state == TicketState::kDone) {
      landing.grant = grant_locked(pool, *pool.cache.find(request.key));
    } else {
      ++unplaced_;
    }
    landings_.push_back(std::move(landing));
  }
  feed_hints_locked();
  ++epoch_;
  ended_.notify_all();
}

}  // namespace sluice
