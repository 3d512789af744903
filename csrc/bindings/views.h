#pragma once

#include <pybind11/pybind11.h>

#include <span>
#include <utility>
#include <vector>

#include "cache/slot_cache.h"
#include "engine/memory_plan.h"
#include "engine/stats.h"
#include "engine/timeline.h"

namespace sluice::bindings {

// Plain structs of the core as plain Python objects. All require the GIL.

[[nodiscard]] pybind11::dict stats_view(const EngineStats& stats);
[[nodiscard]] pybind11::dict plan_view(const MemoryPlan& plan);
[[nodiscard]] pybind11::list timeline_view(std::span<const Span> spans);
[[nodiscard]] pybind11::list residency_view(
    const std::vector<std::vector<SlotCache::SlotView>>& classes);

/// `fn()` without the GIL, for what takes a lock or long.
template <class Fn>
[[nodiscard]] auto without_gil(Fn&& fn) {
  const pybind11::gil_scoped_release no_gil;
  return std::forward<Fn>(fn)();
}

}  // namespace sluice::bindings
