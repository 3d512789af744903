#include "engine/memory_plan.h"

#include <algorithm>
#include <limits>
#include <string>

#include "base/bytes.h"
#include "base/error.h"

namespace sluice {
namespace {

struct Draft {
  MemoryPlan plan;
  std::vector<std::int32_t> largest_layer;  // experts of the largest layer, by class
};

Draft size_classes(std::span<const LayerBytes> layers) {
  Draft draft;
  for (const LayerBytes& layer : layers) {
    require<InternalError>(layer.slot_bytes > 0 && layer.slot_bytes % kSlotAlignment == 0, [&] {
      return "memory plan: got slots of " + std::to_string(layer.slot_bytes) +
             " bytes, expected a positive multiple of " + std::to_string(kSlotAlignment);
    });
    auto& classes = draft.plan.classes;
    const auto same = std::find_if(classes.begin(), classes.end(), [&](const SizeClass& c) {
      return c.slot_bytes == layer.slot_bytes;
    });
    const auto idx = static_cast<std::size_t>(same - classes.begin());
    if (same == classes.end()) {
      classes.push_back({.slot_bytes = layer.slot_bytes, .num_slots = 0, .num_experts = 0});
      draft.largest_layer.push_back(0);
    }
    draft.plan.class_of_layer.push_back(static_cast<std::int32_t>(idx));
    classes[idx].num_experts += layer.num_experts;
    draft.largest_layer[idx] = std::max(draft.largest_layer[idx], layer.num_experts);
  }
  return draft;
}

/// Σ over classes of what `wanted` slots of each take, at most its experts.
template <class Wanted>
std::uint64_t bytes_of(const MemoryPlan& plan, Wanted wanted) {
  std::uint64_t sum = 0;
  for (std::size_t c = 0; c < plan.classes.size(); ++c) {
    const auto slots = std::min<std::int64_t>(wanted(c), plan.classes[c].num_experts);
    const auto bytes = checked_mul(plan.classes[c].slot_bytes, static_cast<std::uint64_t>(slots));
    const auto total = bytes ? checked_add(sum, *bytes) : std::nullopt;
    require<ConfigError>(total.has_value(), [&] {
      return "memory plan: " + std::to_string(plan.classes[c].num_experts) + " experts of " +
             std::to_string(plan.classes[c].slot_bytes) + " bytes exceed 64-bit sizes";
    });
    sum = *total;
  }
  return sum;
}

/// The class whose share of experts with a slot is smallest gets the next slot, as long as one fits
/// into what is left; the first of equals. Returns false when no class can take one.
bool add_slot(MemoryPlan& plan, std::uint64_t& left) {
  SizeClass* next = nullptr;
  for (SizeClass& candidate : plan.classes) {
    if (candidate.num_slots == candidate.num_experts || candidate.slot_bytes > left) continue;
    if (next == nullptr || std::int64_t{candidate.num_slots} * next->num_experts <
                               std::int64_t{next->num_slots} * candidate.num_experts) {
      next = &candidate;
    }
  }
  if (next == nullptr) return false;
  ++next->num_slots;
  left -= next->slot_bytes;
  return true;
}

/// The least budget that gives each class its largest layer: slots are dealt until all have it.
std::uint64_t one_layer_bytes(Draft draft) {
  constexpr auto kAll = std::numeric_limits<std::uint64_t>::max();
  std::uint64_t left = kAll;
  const auto short_of = [&] {
    for (std::size_t c = 0; c < draft.plan.classes.size(); ++c) {
      if (draft.plan.classes[c].num_slots < draft.largest_layer[c]) return true;
    }
    return false;
  };
  while (short_of() && add_slot(draft.plan, left)) {
  }
  return kAll - left;
}

}  // namespace

MemoryPlan plan_memory(std::uint64_t budget_bytes, std::span<const LayerBytes> layers,
                       std::string_view setting) {
  Draft draft = size_classes(layers);
  const auto slots = [](std::int64_t count) { return [count](std::size_t) { return count; }; };
  const std::uint64_t least = bytes_of(draft.plan, slots(1));
  require<CapacityError>(least <= budget_bytes, [&] {
    constexpr std::int64_t kEvery = std::numeric_limits<std::int32_t>::max();
    return std::string(setting) + ": got " + std::to_string(budget_bytes) +
           " bytes, one slot per size class needs " + std::to_string(least) +
           "; budgets that work: " + std::to_string(least) + " (one slot), " +
           std::to_string(bytes_of(draft.plan, slots(2))) + " (two, copies overlap), " +
           std::to_string(one_layer_bytes(draft)) + " (one layer at once), " +
           std::to_string(bytes_of(draft.plan, slots(kEvery))) +
           " (all experts); raise it to one of them";
  });

  MemoryPlan plan = std::move(draft.plan);
  plan.budget_bytes = budget_bytes;
  std::uint64_t left = budget_bytes - least;
  for (SizeClass& size_class : plan.classes) {
    size_class.num_slots = std::min(1, size_class.num_experts);
  }
  while (add_slot(plan, left)) {
  }
#if defined(SLUICE_PLANT_LAW2)
  ++plan.classes.front().num_slots;  // planted: one slot more than the budget pays
#endif
  for (const SizeClass& size_class : plan.classes) {
    plan.slab_bytes += size_class.slot_bytes * static_cast<std::uint64_t>(size_class.num_slots);
  }
  return plan;
}

MemoryPlan plan_staging(std::int32_t num_slots, std::span<const LayerBytes> layers) {
  MemoryPlan plan = size_classes(layers).plan;
  for (SizeClass& size_class : plan.classes) {
    size_class.num_slots = std::min(num_slots, size_class.num_experts);
    plan.slab_bytes += size_class.slot_bytes * static_cast<std::uint64_t>(size_class.num_slots);
  }
  plan.budget_bytes = plan.slab_bytes;
  return plan;
}

}  // namespace sluice
