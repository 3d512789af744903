#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <memory>
#include <optional>
#include <span>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "bindings/bindings.h"
#include "bindings/views.h"
#include "cache/policy.h"
#include "simulate/replay.h"
#include "simulate/replay_policies.h"
#include "simulate/timed_run.h"

namespace sluice::bindings {
namespace {

template <class T>
using Array = py::array_t<T, py::array::c_style>;

template <class T>
std::span<const T> view(const Array<T>& array) {
  return {array.data(), static_cast<std::size_t>(array.size())};
}
template <class T>
std::span<const T> view(const std::optional<Array<T>>& array) {
  return array ? view(*array) : std::span<const T>{};
}

/// A policy that a user wrote in Python. Everything but `victim` may be left out.
class PythonPolicy final : public Policy {
 public:
  explicit PythonPolicy(py::object policy)
      : policy_(std::move(policy)),
        on_event_(method("on_event")),
        on_load_(method("on_load")),
        on_evict_(method("on_evict")),
        on_forecast_(method("on_forecast")),
        victim_(method("victim")) {
    require<ConfigError>(!victim_.is_none(), [&] {
      return "policy: got " + py::repr(policy_).cast<std::string>() +
             " without a method victim(candidates), expected one that returns who leaves";
    });
  }

  void on_event(const CacheEvent& event) override {
    if (on_event_.is_none()) return;
    std::vector<std::int32_t> experts;
    for (const ExpertIdx expert : event.experts) experts.push_back(to_int(expert));
    on_event_(event.step, to_int(event.layer), experts);
  }
  void on_load(ExpertKey key, bool /*guessed*/) override {
    if (!on_load_.is_none()) on_load_(to_int(key.layer), to_int(key.expert));
  }
  void on_evict(ExpertKey key) override {
    if (!on_evict_.is_none()) on_evict_(to_int(key.layer), to_int(key.expert));
  }
  void on_forecast(const ForecastRows& rows) override {
    if (on_forecast_.is_none()) return;
    on_forecast_(rows.step, to_int(rows.first_layer),
                 std::vector<float>(rows.scores.begin(), rows.scores.end()));
  }
  [[nodiscard]] std::size_t victim(std::span<const Candidate> candidates) override {
    py::list keys;
    for (const Candidate& each : candidates) {
      keys.append(py::make_tuple(to_int(each.key.layer), to_int(each.key.expert)));
    }
    const py::object chosen = victim_(keys);
    const bool is_index = py::isinstance<py::int_>(chosen);
    const auto idx = is_index ? chosen.cast<std::int64_t>() : -1;
    require<ConfigError>(idx >= 0 && std::cmp_less(idx, candidates.size()), [&] {
      return "policy: victim(candidates) returned " + py::repr(chosen).cast<std::string>() +
             ", expected an index below " + std::to_string(candidates.size());
    });
    return static_cast<std::size_t>(idx);
  }

 private:
  [[nodiscard]] py::object method(const char* name) const {
    return py::getattr(policy_, name, py::none());
  }

  py::object policy_;
  py::object on_event_;
  py::object on_load_;
  py::object on_evict_;
  py::object on_forecast_;
  py::object victim_;
};

/// By name, or made by a Python class or function of (num_layers, num_experts, num_slots).
MakePolicy policy_maker(const py::object& policy, const Routes& routes) {
  if (!py::isinstance<py::str>(policy)) {
    require<ConfigError>(PyCallable_Check(policy.ptr()) != 0, [&] {
      return "policy: got " + py::repr(policy).cast<std::string>() +
             ", expected a name, or a class that is made of (num_layers, num_experts, num_slots)";
    });
    return [policy](PolicyShape shape) {
      return std::make_unique<PythonPolicy>(
          policy(shape.num_layers, shape.max_experts, shape.num_slots));
    };
  }
  const auto name = policy.cast<std::string>();
  if (name == "belady") {
    return [routes](PolicyShape shape) { return make_belady_policy(routes, shape); };
  }
  if (name == "mrs") return &make_mrs_policy;
  return [name](PolicyShape shape) { return make_policy(name, shape); };
}

/// Routes as Python holds them, for as long as a call lasts.
struct RouteArrays {
  RouteArrays(std::int32_t layers_of_model, std::int32_t experts_of_layer,
              Array<std::int64_t> event_steps, Array<std::int32_t> event_layers,
              Array<std::int64_t> event_begins, Array<std::int32_t> event_experts,
              std::optional<Array<float>> router_weights)
      : num_layers(layers_of_model),
        num_experts(experts_of_layer),
        steps(std::move(event_steps)),
        layers(std::move(event_layers)),
        begins(std::move(event_begins)),
        experts(std::move(event_experts)),
        weights(std::move(router_weights)) {}
  [[nodiscard]] Routes routes() const {
    return {.num_layers = num_layers,
            .max_experts = num_experts,
            .steps = view(steps),
            .layers = view(layers),
            .begins = view(begins),
            .experts = view(experts),
            .weights = view(weights)};
  }

  std::int32_t num_layers;
  std::int32_t num_experts;
  Array<std::int64_t> steps;
  Array<std::int32_t> layers;
  Array<std::int64_t> begins;
  Array<std::int32_t> experts;
  std::optional<Array<float>> weights;
};

py::dict replay_routes(const RouteArrays& arrays, std::vector<std::int32_t> slots,
                       const py::object& policy, bool bypass, std::int64_t unscored_events,
                       const std::vector<std::pair<std::int32_t, std::int32_t>>& preloaded,
                       const std::optional<Array<float>>& scores) {
  const Routes routes = arrays.routes();
  ReplaySettings settings{.slots = std::move(slots),
                          .bypass = bypass,
                          .unscored_events = unscored_events,
                          .preloaded = {}};
  for (const auto& [layer, expert] : preloaded) {
    settings.preloaded.push_back(make_key(layer, expert));
  }
  const MakePolicy make = policy_maker(policy, routes);
  ReplayResult result;
  if (py::isinstance<py::str>(policy)) {
    const py::gil_scoped_release no_gil;
    result = replay(routes, settings, make, view(scores));
  } else {
    result = replay(routes, settings, make, view(scores));
  }
  const auto column = [&](std::int64_t ReplayCounts::* member) {
    std::vector<std::int64_t> values;
    for (const ReplayCounts& each : result.layers) values.push_back(each.*member);
    return values;
  };
  py::dict out;
  out["requests"] = column(&ReplayCounts::requests);
  out["hits"] = column(&ReplayCounts::hits);
  out["first_uses"] = column(&ReplayCounts::first_uses);
  out["returns"] = column(&ReplayCounts::returns);
  out["event_hits"] =
      py::array(static_cast<py::ssize_t>(result.event_hits.size()), result.event_hits.data());
  out["events"] = result.events;
  out["waves"] = result.waves;
  out["evictions"] = result.evictions;
  return out;
}

py::dict timed_run(const RouteArrays& arrays, std::uint64_t expert_bytes, std::uint64_t chunk_bytes,
                   double bytes_per_second, double seconds_per_chunk, int depth,
                   double dense_seconds, double expert_seconds, std::int32_t num_slots,
                   std::string policy, const std::optional<Array<std::int64_t>>& guess_begins,
                   const std::optional<Array<std::int32_t>>& guess_layers,
                   const std::optional<Array<std::int32_t>>& guess_experts,
                   const std::optional<Array<float>>& guess_probabilities,
                   const std::optional<Array<std::int32_t>>& guess_steps,
                   const std::optional<Array<float>>& scores) {
  const TimedSettings settings{.expert_bytes = expert_bytes,
                               .chunk_bytes = chunk_bytes,
                               .link = {.bytes_per_second = bytes_per_second,
                                        .seconds_per_chunk = seconds_per_chunk,
                                        .depth = depth},
                               .dense_seconds = dense_seconds,
                               .expert_seconds = expert_seconds,
                               .num_slots = num_slots,
                               .policy = std::move(policy)};
  const GuessTable guesses{.begins = view(guess_begins),
                           .layers = view(guess_layers),
                           .experts = view(guess_experts),
                           .probabilities = view(guess_probabilities),
                           .steps_ahead = view(guess_steps)};
  TimedResult result;
  {
    const py::gil_scoped_release no_gil;
    result = run_timed(arrays.routes(), settings, guesses, view(scores));
  }
  const auto column = [](const auto& values) {
    return py::array(static_cast<py::ssize_t>(values.size()), values.data());
  };
  py::dict out;
  out["stats"] = stats_view(result.stats);
  out["step_ends_ns"] = column(result.step_ends);
  out["demand_bytes"] = column(result.demand_bytes);
  out["wasted_bytes"] = column(result.wasted_bytes);
  return out;
}

}  // namespace

void bind_simulate(py::module_& m) {
  py::class_<RouteArrays>(m, "Routes", "Events of a trace: visits of layers, by step.")
      .def(py::init<std::int32_t, std::int32_t, Array<std::int64_t>, Array<std::int32_t>,
                    Array<std::int64_t>, Array<std::int32_t>, std::optional<Array<float>>>(),
           py::arg("num_layers"), py::arg("num_experts"), py::arg("steps"), py::arg("layers"),
           py::arg("begins"), py::arg("experts"), py::arg("weights"));
  m.def("replay", &replay_routes, py::arg("routes"), py::arg("slots"), py::arg("policy"),
        py::arg("bypass"), py::arg("unscored_events"), py::arg("preloaded"), py::arg("scores"),
        "Replays routes through slot caches, event by event: per layer requests, hits, first_uses "
        "and returns; event_hits, events, waves, evictions.");
  m.def("run_timed", &timed_run, py::arg("routes"), py::kw_only(), py::arg("expert_bytes"),
        py::arg("chunk_bytes"), py::arg("bytes_per_second"), py::arg("seconds_per_chunk"),
        py::arg("depth"), py::arg("dense_seconds"), py::arg("expert_seconds"), py::arg("num_slots"),
        py::arg("policy"), py::arg("guess_begins") = py::none(),
        py::arg("guess_layers") = py::none(), py::arg("guess_experts") = py::none(),
        py::arg("guess_probabilities") = py::none(), py::arg("guess_steps") = py::none(),
        py::arg("scores") = py::none(),
        "Runs routes through a session's engine on a virtual clock: stats, step_ends_ns, and per "
        "event the sums demand_bytes and wasted_bytes.");
}

}  // namespace sluice::bindings
