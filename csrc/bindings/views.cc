#include "bindings/views.h"

#include <pybind11/stl.h>

#include <string_view>

namespace sluice::bindings {
namespace py = pybind11;
namespace {

std::string_view state_name(SlotState state) {
  switch (state) {
    case SlotState::kEmpty:
      return "empty";
    case SlotState::kLoading:
      return "loading";
    case SlotState::kReady:
      return "ready";
  }
  return "?";
}

}  // namespace

py::dict stats_view(const EngineStats& s) {
  py::dict out;
  const auto put = [&](const char* name, auto value) { out[name] = value; };
  put("forwards", s.forwards);
  put("tokens", s.tokens);
  put("requests", s.requests);
  put("hits", s.hits);
  put("late", s.late);
  put("misses", s.misses);
  put("waves", s.waves);
  put("evictions", s.evictions);
  put("hints", s.hints);
  put("hints_dropped", s.hints_dropped);
  put("hints_distrusted", s.hints_distrusted);
  put("bytes_read_demand", s.bytes_read_demand);
  put("bytes_read_hint_used", s.bytes_read_hint_used);
  put("bytes_read_hint_wasted", s.bytes_read_hint_wasted);
  put("bytes_read_hint_pending", s.bytes_read_hint_pending);
  put("bytes_read", s.bytes_read);
  put("stall_ns", s.stall_ns);
  put("demand_ns", s.demand_ns);
  put("compute_ns", s.compute_ns);
  put("generic_gate_calls", s.generic_gate_calls);
  put("resident_bytes", s.resident_bytes);
  put("peak_resident_bytes", s.peak_resident_bytes);
  put("budget_bytes", s.budget_bytes);
  put("slab_bytes", s.slab_bytes);
  put("workspace_bytes", s.workspace_bytes);
  put("adopted_bytes", s.adopted_bytes);
  put("host_hits", s.host_hits);
  put("host_misses", s.host_misses);
  put("store_bytes_read", s.store_bytes_read);
  put("host_tier_bytes", s.host_tier_bytes);
  put("host_filled_bytes", s.host_filled_bytes);
  put("pinned_bytes", s.pinned_bytes);
  put("degradations", s.degradations);
  return out;
}

py::dict plan_view(const MemoryPlan& plan) {
  py::list classes;
  for (const SizeClass& size : plan.classes) {
    py::dict entry;
    entry["slot_bytes"] = size.slot_bytes;
    entry["num_slots"] = size.num_slots;
    entry["num_experts"] = size.num_experts;
    classes.append(entry);
  }
  py::dict out;
  out["budget_bytes"] = plan.budget_bytes;
  out["slab_bytes"] = plan.slab_bytes;
  out["classes"] = classes;
  out["class_of_layer"] = plan.class_of_layer;
  return out;
}

py::list timeline_view(std::span<const Span> spans) {
  const auto seconds = [](Nanos nanos) { return static_cast<double>(nanos) * 1e-9; };
  py::list out;
  for (const Span& span : spans) {
    out.append(py::make_tuple(span_name(span.kind), seconds(span.begin), seconds(span.end),
                              to_int(span.key.layer), to_int(span.key.expert), span.bytes,
                              span.tokens));
  }
  return out;
}

py::list residency_view(const std::vector<std::vector<SlotCache::SlotView>>& classes) {
  py::list out;
  for (const auto& slots : classes) {
    py::list views;
    for (const SlotCache::SlotView& view : slots) {
      views.append(py::make_tuple(state_name(view.state), to_int(view.key.layer),
                                  to_int(view.key.expert), view.leases));
    }
    out.append(views);
  }
  return out;
}

}  // namespace sluice::bindings
