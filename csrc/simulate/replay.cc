#include "simulate/replay.h"

#include <algorithm>
#include <optional>
#include <string>
#include <utility>
#include <variant>

#include "base/error.h"
#include "cache/policies.h"
#include "cache/slot_cache.h"

namespace sluice {
namespace {

std::int32_t largest_event(const Routes& routes) {
  std::int64_t largest = 1;
  for (std::size_t i = 0; i < routes.steps.size(); ++i) {
    largest = std::max(largest, routes.begins[i + 1] - routes.begins[i]);
  }
  return static_cast<std::int32_t>(largest);
}

void check(const Routes& routes, const ReplaySettings& settings, std::span<const float> scores) {
  routes.check();
  const std::size_t num_slots = settings.slots.size();
  require<ConfigError>(num_slots == 1 || std::cmp_equal(num_slots, routes.num_layers), [&] {
    return "replay: got slots for " + std::to_string(num_slots) +
           " layers, expected one number for all or one for each of " +
           std::to_string(routes.num_layers);
  });
  for (const std::int32_t slots : settings.slots) {
    require<ConfigError>(slots > 0, [&] {
      return "replay: got " + std::to_string(slots) + " slots, expected at least 1";
    });
  }
  const auto expected =
      static_cast<std::size_t>(routes.num_events()) * static_cast<std::size_t>(routes.max_experts);
  require<ConfigError>(scores.empty() || scores.size() == expected, [&] {
    return "replay: got " + std::to_string(scores.size()) + " keep-scores, expected " +
           std::to_string(expected) + ", one row of " + std::to_string(routes.max_experts) +
           " per event";
  });
}

/// The slots of one layer, or of all, with room for an event beside them.
class Pool {
 public:
  Pool(std::int32_t num_slots, std::int32_t room, std::unique_ptr<Policy> policy)
      : num_slots_(num_slots), cache_(num_slots + room, std::move(policy)) {}

  void preload(ExpertKey key) {
    if (num_preloaded_ == num_slots_) return;
    load(key);
    ++num_preloaded_;
  }
  /// Whether the expert was here before its event.
  [[nodiscard]] bool serve(ExpertKey key) {
    std::optional<SlotLease> lease = cache_.find(key);
    const bool hit = lease.has_value();
    if (!hit) {
      load(key);
      lease = cache_.find(key);
    }
    leases_.push_back(*std::move(lease));
    return hit;
  }
  /// The event is over: the policy says who stays.
  [[nodiscard]] std::int64_t settle(bool bypass) {
    const bool fits = std::cmp_less_equal(leases_.size(), num_slots_);
    if (bypass || !fits) leases_.clear();
    const std::int32_t evicted = cache_.trim(num_slots_);
    leases_.clear();
    return evicted;
  }
  [[nodiscard]] SlotCache& cache() { return cache_; }
  [[nodiscard]] std::int32_t num_slots() const { return num_slots_; }

 private:
  void load(ExpertKey key) {
    const auto begun = cache_.begin_load(key, SlotCache::Purpose::kDemand);
    require<InternalError>(std::holds_alternative<SlotIdx>(begun), [&] {
      return "replay: got no slot for " + describe(key) + ", expected room for every event";
    });
    cache_.finish_load(key);
  }

  std::int32_t num_slots_;
  std::int32_t num_preloaded_ = 0;
  SlotCache cache_;
  std::vector<SlotLease> leases_;  // before the cache in its end
};

}  // namespace

void Routes::check() const {
  require<ConfigError>(num_layers > 0 && max_experts > 0, [&] {
    return "routes: got " + std::to_string(num_layers) + " layers of " +
           std::to_string(max_experts) + " experts, expected at least one of each";
  });
  const std::size_t num = steps.size();
  require<ConfigError>(layers.size() == num && begins.size() == num + 1, [&] {
    return "routes: got " + std::to_string(num) + " steps, " + std::to_string(layers.size()) +
           " layers and " + std::to_string(begins.size()) +
           " begins, expected one layer per step and one begin more";
  });
  require<ConfigError>(begins.front() == 0 && std::cmp_equal(begins.back(), experts.size()), [&] {
    return "routes: got begins from " + std::to_string(begins.front()) + " to " +
           std::to_string(begins.back()) + ", expected 0 to " + std::to_string(experts.size());
  });
  require<ConfigError>(weights.empty() || weights.size() == experts.size(), [&] {
    return "routes: got " + std::to_string(weights.size()) + " weights, expected none or " +
           std::to_string(experts.size());
  });
  std::vector<std::int64_t> seen_in(static_cast<std::size_t>(max_experts), -1);
  for (std::size_t i = 0; i < num; ++i) {
    const auto at = [&] { return "routes: event " + std::to_string(i) + ": "; };
    require<ConfigError>(
        begins[i] <= begins[i + 1] && std::cmp_less_equal(begins[i + 1], experts.size()),
        [&] { return at() + "begins fall"; });
    require<ConfigError>(layers[i] >= 0 && layers[i] < num_layers, [&] {
      return at() + "got layer " + std::to_string(layers[i]) + ", expected one below " +
             std::to_string(num_layers);
    });
    const bool later = i == 0 || steps[i] > steps[i - 1] ||
                       (steps[i] == steps[i - 1] && layers[i] > layers[i - 1]);
    require<ConfigError>(later, [&] {
      return at() + "got step " + std::to_string(steps[i]) + " layer " + std::to_string(layers[i]) +
             ", expected steps, and layers within a step, to rise";
    });
    for (std::int64_t j = begins[i]; j < begins[i + 1]; ++j) {
      const std::int32_t expert = experts[static_cast<std::size_t>(j)];
      require<ConfigError>(expert >= 0 && expert < max_experts, [&] {
        return at() + "got expert " + std::to_string(expert) + ", expected one below " +
               std::to_string(max_experts);
      });
      std::int64_t& seen = seen_in[static_cast<std::size_t>(expert)];
      require<ConfigError>(!std::cmp_equal(seen, i), [&] {
        return at() + "got expert " + std::to_string(expert) + " twice, expected each once";
      });
      seen = static_cast<std::int64_t>(i);
    }
  }
}

ReplayResult replay(const Routes& routes, const ReplaySettings& settings,
                    const MakePolicy& make_policy, std::span<const float> scores) {
  check(routes, settings, scores);
  const bool pooled = settings.slots.size() == 1 && routes.num_layers > 1;
  const std::int32_t room = largest_event(routes);
  std::vector<std::unique_ptr<Pool>> pools;
  for (const std::int32_t num_slots : settings.slots) {
    pools.push_back(std::make_unique<Pool>(num_slots, room,
                                           make_policy({.num_layers = routes.num_layers,
                                                        .max_experts = routes.max_experts,
                                                        .num_slots = num_slots,
                                                        .layers_served = pooled ? 0 : 1})));
  }
  const auto pool_of = [&](std::int32_t layer) -> Pool& {
    return *pools[pooled ? 0 : static_cast<std::size_t>(layer)];
  };
  const PolicyShape shape{.num_layers = routes.num_layers, .max_experts = routes.max_experts};
  PerExpert<char> was_here(shape, 0);
  for (const ExpertKey key : settings.preloaded) {
    was_here[key] = 1;
    pool_of(to_int(key.layer)).preload(key);
  }

  ReplayResult result;
  result.layers.resize(static_cast<std::size_t>(routes.num_layers));
  const auto width = static_cast<std::size_t>(routes.max_experts);
  std::vector<ExpertIdx> experts;
  for (std::size_t i = 0; i < routes.steps.size(); ++i) {
    const std::int32_t layer = routes.layers[i];
    Pool& pool = pool_of(layer);
    const auto begin = static_cast<std::size_t>(routes.begins[i]);
    const auto count = static_cast<std::size_t>(routes.begins[i + 1]) - begin;
    experts.clear();
    for (std::size_t j = 0; j < count; ++j) experts.push_back(ExpertIdx{routes.experts[begin + j]});
    CacheEvent event{.step = routes.steps[i], .layer = LayerIdx{layer}, .experts = experts};
    if (!routes.weights.empty()) event.weights = routes.weights.subspan(begin, count);
    pool.cache().touch(event);
    if (!scores.empty()) {  // behind the event: who judges scores must not see the next ones
      pool.cache().publish({.step = routes.steps[i],
                            .first_layer = LayerIdx{layer},
                            .scores = scores.subspan(i * width, width)});
    }
    ReplayCounts counts;
    for (const ExpertIdx expert : experts) {
      const ExpertKey key{LayerIdx{layer}, expert};
      ++counts.requests;
      if (pool.serve(key)) {
        ++counts.hits;
      } else {
        ++(was_here[key] != 0 ? counts.returns : counts.first_uses);
      }
      was_here[key] = 1;
    }
    result.event_hits.push_back(static_cast<std::int32_t>(counts.hits));
    const std::int64_t evicted = pool.settle(settings.bypass);
    if (std::cmp_less(i, settings.unscored_events)) continue;
    ReplayCounts& sum = result.layers[static_cast<std::size_t>(layer)];
    sum.requests += counts.requests;
    sum.hits += counts.hits;
    sum.first_uses += counts.first_uses;
    sum.returns += counts.returns;
    result.evictions += evicted;
    ++result.events;
    result.waves +=
        std::max<std::int64_t>(1, (counts.requests + pool.num_slots() - 1) / pool.num_slots());
  }
  return result;
}

}  // namespace sluice
