#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <string_view>
#include <vector>

#include "base/ids.h"

namespace sluice {

/// A layer's demand on memory, as the store gives it.
struct LayerBytes {
  std::size_t slot_bytes = 0;
  std::int32_t num_experts = 0;
};

/// Slots of one size: layers whose slots are equally large share them.
struct SizeClass {
  std::size_t slot_bytes = 0;
  std::int32_t num_slots = 0;
  std::int32_t num_experts = 0;  ///< of all its layers
};

/// What one byte budget buys.
struct MemoryPlan {
  std::uint64_t budget_bytes = 0;
  std::uint64_t slab_bytes = 0;  ///< Σ slot_bytes · num_slots, at most the budget
  std::vector<SizeClass> classes;
  std::vector<std::int32_t> class_of_layer;
};

/// Cuts `budget_bytes` into whole slots: at least one per size class, the rest in proportion to the
/// classes' expert bytes, none beyond a class's experts.
/// Errors: CapacityError below one slot per size class; the message names the least budget that
/// works, the one from which copies overlap (two slots), one layer at once, and all of it.
/// `setting`: as the message calls the budget.
[[nodiscard]] MemoryPlan plan_memory(std::uint64_t budget_bytes, std::span<const LayerBytes> layers,
                                     std::string_view setting = "device_memory");

/// `num_slots` of each class, as far as it has experts, whatever they take.
[[nodiscard]] MemoryPlan plan_staging(std::int32_t num_slots, std::span<const LayerBytes> layers);

}  // namespace sluice
