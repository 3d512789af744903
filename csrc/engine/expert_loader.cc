#include "engine/expert_loader.h"

#include <algorithm>
#include <utility>

#include "base/log_ring.h"

namespace sluice {
namespace {

PolicyShape shape_of(const ExpertStore& store) {
  PolicyShape shape{.num_layers = store.num_layers()};
  for (std::int32_t l = 0; l < shape.num_layers; ++l) {
    shape.max_experts = std::max(shape.max_experts, store.layer(LayerIdx{l}).num_experts);
  }
  return shape;
}

}  // namespace

ExpertLoader::ExpertLoader(std::shared_ptr<const ExpertStore> store, Device& device,
                           const MakePath& make_path, const Clock& clock, std::string_view policy,
                           const MemoryPlan& plan, Timeline& timeline, std::function<void()> drive)
    : store_(std::move(store)),
      device_(device),
      clock_(clock),
      timeline_(timeline),
      drive_(std::move(drive)),
      class_of_layer_(plan.class_of_layer),
      trust_(store_->num_layers()) {
  PolicyShape shape = shape_of(*store_);
  for (const SizeClass& size_class : plan.classes) {
    const auto number = static_cast<std::int32_t>(pools_.size());
    shape.num_slots = size_class.num_slots;
    shape.layers_served = static_cast<std::int32_t>(
        std::count(class_of_layer_.begin(), class_of_layer_.end(), number));
    experts_of_class_.push_back(size_class.num_experts);
    pools_.push_back(size_class.num_slots == 0
                         ? nullptr
                         : std::make_unique<SlotPool>(size_class.slot_bytes, size_class.num_slots,
                                                      make_policy(policy, shape), device));
  }
  max_experts_ = shape.max_experts;
  for (std::int32_t l = 0; l < shape.num_layers; ++l) {
    slot_of_.emplace_back(static_cast<std::size_t>(store_->layer(LayerIdx{l}).num_experts), -1);
  }
  for (std::vector<Landing>* const each : {&landings_, &dropped_}) {
    each->reserve(static_cast<std::size_t>(shape.max_experts));
  }
  abandoned_.reserve(static_cast<std::size_t>(shape.max_experts));
  stats_.budget_bytes = plan.budget_bytes;
  stats_.slab_bytes = plan.slab_bytes;
  path_ = make_path();
  path_->connect(
      [this](const LoadRequest& request, TicketState state, const std::exception_ptr& error,
             std::uint64_t bytes_read) {
        try {
          finished(request, state, error, bytes_read);
        } catch (...) {
          break_down(std::current_exception());
        }
      },
      [this](std::exception_ptr error) { break_down(std::move(error)); });
  std::int32_t num_slots = 0;
  for (const SizeClass& size_class : plan.classes) num_slots += size_class.num_slots;
  path_->reserve(num_slots);  // one load a slot
}

ExpertLoader::~ExpertLoader() { path_->close(); }

void ExpertLoader::break_down(std::exception_ptr error) {
  const MutexLock lock(mu_);
  if (!broken_) broken_ = std::move(error);
  ++epoch_;
  ended_.notify_all();
}

SlotPool& ExpertLoader::pool_of(LayerIdx layer) const {
  const auto idx = class_of_layer_[static_cast<std::size_t>(to_int(layer))];
  return *pools_[static_cast<std::size_t>(idx)];
}

std::int32_t& ExpertLoader::slot_of_locked(ExpertKey key) {
  return slot_of_[static_cast<std::size_t>(to_int(key.layer))]
                 [static_cast<std::size_t>(to_int(key.expert))];
}

std::int32_t ExpertLoader::num_slots(LayerIdx layer) const {
  return pool_of(layer).cache.num_slots();
}

std::int32_t ExpertLoader::num_experts(LayerIdx layer) const {
  const auto idx = class_of_layer_[static_cast<std::size_t>(to_int(layer))];
  return experts_of_class_[static_cast<std::size_t>(idx)];
}

bool ExpertLoader::has_empty_slot(LayerIdx layer) const {
  const MutexLock lock(mu_);
  const SlotPool& pool = pool_of(layer);
  return pool.occupied < pool.cache.num_slots();
}

Nanos ExpertLoader::step() { return path_->step(); }

EngineStats ExpertLoader::stats() const {
  const MutexLock lock(mu_);
  EngineStats stats = stats_;
  if (waves_at_decode_ > 0) stats.degradations["waves_at_decode"] = waves_at_decode_;
  if (scorers_lost_ > 0) stats.degradations["scorers_lost"] = scorers_lost_;
  return stats;
}

std::vector<std::vector<SlotCache::SlotView>> ExpertLoader::residency() const {
  std::vector<std::vector<SlotCache::SlotView>> views;
  for (const auto& pool : pools_) {
    views.push_back(pool ? pool->cache.snapshot() : std::vector<SlotCache::SlotView>{});
  }
  return views;
}

void ExpertLoader::wait_until_idle() {
  for (;;) {
    std::uint64_t seen = 0;
    {
      const MutexLock lock(mu_);
      if (loads_in_flight_ == 0 || broken_) return;
      seen = epoch_;
    }
    step();
    wait_for_end(seen, std::chrono::milliseconds(50));
  }
}

bool ExpertLoader::synchronize_at_end(EventHandle event) noexcept {
  try {
    device_.synchronize(event);
    return true;
  } catch (const std::exception& error) {
    log_ring().log(LogLevel::kError, error.what());
    return false;
  }
}

void ExpertLoader::close() {
  {
    const MutexLock lock(mu_);
    paused_ = true;
    stats_.hints_dropped += hints_.clear();
  }
  path_->cancel_all();
  wait_until_idle();
  path_->close();
  const MutexLock lock(mu_);
  bool answers = true;
  for (const auto& pool : pools_) {
    if (!pool) continue;
    pool->cache.evict_all();
    for (SlotRecord& record : pool->records) {
      if (record.occupied) vacate_locked(*pool, record);
      answers = answers && synchronize_at_end(record.last_use);  // kernels may still read the slab
      device_.release(std::exchange(record.last_use, {}));
    }
    pool->slab = {};
  }
  stats_.slab_bytes = 0;
}

}  // namespace sluice
