#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cmath>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "base/clock.h"
#include "base/dtype.h"
#include "base/log_ring.h"
#include "bindings/bindings.h"
#include "bindings/errors.h"
#include "bindings/registry.h"
#include "bindings/scorers.h"
#include "bindings/session_state.h"
#include "bindings/views.h"
#include "engine/scorer.h"

namespace sluice::bindings {
namespace {

using WithoutGil = py::call_guard<py::gil_scoped_release>;

/// What Python holds as `_core.Session`. Its end closes the session, whoever else still calls it.
class SessionHandle {
 public:
  explicit SessionHandle(std::shared_ptr<SessionState> state)
      : state_(std::move(state)), handle_(add_session(state_)) {}
  ~SessionHandle() {
    if (state_->is_inherited()) {
      // Leaked: the engine's threads are not in this process, so nothing here may end it.
      (void)new std::shared_ptr<SessionState>(std::move(state_));
      return;
    }
    const py::gil_scoped_release no_gil;  // reads in flight are awaited
    try {
      close();
    } catch (const std::exception& error) {
      log_ring().log(LogLevel::kError, error.what());
    }
    remove_session(handle_);  // also where closing was refused: the running call holds the state
    state_.reset();
  }
  SessionHandle(const SessionHandle&) = delete;
  SessionHandle& operator=(const SessionHandle&) = delete;

  [[nodiscard]] std::int64_t handle() const noexcept { return handle_; }
  [[nodiscard]] SessionState& state() const noexcept { return *state_; }
  [[nodiscard]] Engine& engine() const { return state_->engine(); }
  [[nodiscard]] bool closed() const noexcept { return state_->closed(); }
  void close() {
    if (state_->is_inherited()) return;
    remove_session(handle_);  // first: calls that begin now would wait for the turn before us
    try {
      state_->close();
    } catch (...) {  // refused inside of a forward: the session stays open
      restore_session(handle_, state_);
      throw;
    }
  }

 private:
  std::shared_ptr<SessionState> state_;
  std::int64_t handle_;
};

SharedPyObject callback(const py::dict& gate, const char* key) {
  py::object fn = gate.contains(key) ? py::object(gate[key]) : py::object(py::none());
  require<ConfigError>(fn.is_none() || PyCallable_Check(fn.ptr()) != 0,
                       [&] { return std::string(key) + ": expected a function or None"; });
  return share(std::move(fn));
}

GateSettings gate_settings(const py::dict& gate) {
  GateSettings settings;
  settings.spec = gate_from_dict(gate);
  settings.gate_callback = callback(gate, "gate_callback");
  settings.post_callback = callback(gate, "post_callback");
  require<ConfigError>(
      settings.spec.kind != GateKind::kGeneric || settings.gate_callback != nullptr,
      [] { return "gate_callback: missing; kind \"generic\" needs one"; });
  return settings;
}

std::unique_ptr<SessionHandle> open_session(const StoreHandle& store, const std::string& device,
                                            std::uint64_t device_memory, std::uint64_t host_memory,
                                            std::string host_tier, std::uint64_t pinned_cap,
                                            std::string prefill, std::string policy, int io_threads,
                                            bool timeline, bool nvtx,
                                            const std::vector<py::dict>& gates) {
  require<ConfigError>(static_cast<std::int64_t>(gates.size()) == store.store->num_layers(), [&] {
    return "gates: got " + std::to_string(gates.size()) + ", expected " +
           std::to_string(store.store->num_layers()) + ", one per layer of the store";
  });
  std::vector<GateSettings> settings;
  for (const py::dict& gate : gates) settings.push_back(gate_settings(gate));
  EngineOptions options{.device_memory = device_memory,
                        .host_memory = host_memory,
                        .host_tier = std::move(host_tier),
                        .pinned_cap = pinned_cap,
                        .prefill = std::move(prefill),
                        .policy = std::move(policy),
                        .io_threads = io_threads,
                        .timeline = timeline};
  const py::gil_scoped_release no_gil;
  return std::make_unique<SessionHandle>(std::make_shared<SessionState>(
      store.store, device, std::move(options), std::move(settings), nvtx));
}

/// The op's call for Python's twin of `_ops`: by handle, errors raised as they are.
void forward(std::int64_t handle, std::int64_t layer, std::int64_t num_tokens, std::int64_t top_k,
             std::int64_t columns, const std::string& activations, const std::string& weights_dtype,
             std::uint64_t hidden, std::uint64_t expert_ids, std::uint64_t weights,
             std::uint64_t out, std::int32_t device, std::uint64_t stream) {
  const std::uint64_t bytes = num_tokens > 0 && columns > 0 ? 1 : 0;
  SluiceForwardCall call{};
  call.handle = handle;
  call.layer = layer;
  call.num_tokens = num_tokens;
  call.top_k = top_k;
  call.activations = static_cast<std::int32_t>(parse_dtype(activations));
  call.weights_dtype = static_cast<std::int32_t>(parse_dtype(weights_dtype));
  call.hidden = address_of(hidden, bytes);
  call.expert_ids =
      reinterpret_cast<const std::int64_t*>(address_of(expert_ids, top_k > 0 ? bytes : 0));
  call.weights = address_of(weights, top_k > 0 ? bytes : 0);
  call.out = address_of(out, bytes);
  call.columns = columns;
  call.device = device;
  call.stream = stream;
  const std::shared_ptr<SessionState> session = find_session(handle);
  if (session == nullptr) std::rethrow_exception(take_error(handle));
  if (session->forward(call) != 0) std::rethrow_exception(session->take_error());
}

void give_hints(const SessionHandle& session,
                const std::vector<std::tuple<std::int32_t, std::int32_t, double, double>>& given) {
  constexpr double kLongest = 1e9;  // seconds; above, a deadline never comes
  const Nanos now = SteadyClock().now();
  std::vector<Hint> hints;
  hints.reserve(given.size());
  for (const auto& [layer, expert, probability, seconds] : given) {
    require<ConfigError>(!std::isnan(probability) && !std::isnan(seconds), [&] {
      return "hint: got probability " + std::to_string(probability) + " and deadline " +
             std::to_string(seconds) + ", expected numbers";
    });
    const Nanos deadline =
        seconds > kLongest ? kNever : now + static_cast<Nanos>(std::max(seconds, -kLongest) * 1e9);
    hints.push_back({make_key(layer, expert), probability, deadline});
  }
  const py::gil_scoped_release no_gil;
  session.engine().hint(hints);
}

void publish_forecast(const SessionHandle& session, std::int32_t first_layer,
                      const py::array_t<float, py::array::c_style>& scores,
                      std::int64_t age_steps) {
  const std::span<const float> rows(scores.data(), static_cast<std::size_t>(scores.size()));
  const py::gil_scoped_release no_gil;
  session.engine().publish(LayerIdx{first_layer}, rows, age_steps);
}

std::int64_t add_scorer(const SessionHandle& session, const std::string& kind,
                        const py::dict& tables) {
  std::unique_ptr<Scorer> scorer = make_scorer(kind, tables);
  const py::gil_scoped_release no_gil;
  return session.engine().add_scorer(std::move(scorer));
}

void begin_step(const SessionHandle& session,
                const py::array_t<std::int64_t, py::array::c_style>& requests, std::int64_t tokens,
                const py::array_t<std::int64_t, py::array::c_style>& token_ids) {
  const StepRows rows{.requests = {requests.data(), static_cast<std::size_t>(requests.size())},
                      .tokens = tokens,
                      .token_ids = {token_ids.data(), static_cast<std::size_t>(token_ids.size())}};
  const py::gil_scoped_release no_gil;
  session.engine().begin_step(rows);
}

py::dict plan_of(std::uint64_t budget_bytes,
                 const std::vector<std::pair<std::size_t, std::int32_t>>& layers) {
  std::vector<LayerBytes> demands;
  for (const auto& [slot_bytes, num_experts] : layers) {
    demands.push_back({.slot_bytes = slot_bytes, .num_experts = num_experts});
  }
  return plan_view(plan_memory(budget_bytes, demands));
}

py::object python_error(const std::exception_ptr& error) {
  return error == nullptr ? py::object(py::none()) : to_python_exception(error);
}

py::object taken_error(std::int64_t handle) {
  return python_error(without_gil([&] { return take_error(handle); }));
}

}  // namespace

void bind_session(py::module_& m) {
  py::class_<SessionHandle>(
      m, "Session", "One engine in the registry of sessions; `handle` is what the op takes.")
      .def(py::init(&open_session), py::arg("store"), py::kw_only(), py::arg("device") = "cpu",
           py::arg("device_memory"), py::arg("host_memory") = 0, py::arg("host_tier") = "inclusive",
           py::arg("pinned_cap") = ~std::uint64_t{0}, py::arg("prefill") = "stream",
           py::arg("policy"), py::arg("io_threads"), py::arg("timeline") = true,
           py::arg("nvtx") = false, py::arg("gates"))
      .def_property_readonly("handle", &SessionHandle::handle)
      .def("forecast", &publish_forecast, py::arg("first_layer"), py::arg("scores"),
           py::arg("age_steps") = 0,
           "Keep-scores [layers, experts] float32 of whole layers, made so many steps ago.")
      .def("add_scorer", &add_scorer, py::arg("kind"), py::arg("tables"),
           "Has it guess and rank inside of forwards; the number to remove it by.")
      .def(
          "remove_scorer",
          [](const SessionHandle& s, std::int64_t number) { s.engine().remove_scorer(number); },
          py::arg("number"), WithoutGil())
      .def(
          "begin_step", &begin_step, py::arg("requests"), py::arg("tokens"), py::arg("token_ids"),
          "Tells the scorers whose rows the next layers are of, as `Scorer.begin_step` takes them.")
      .def("hint", &give_hints, py::arg("hints"),
           "(layer, expert, probability, seconds from now until worthless; inf: never).")
      .def(
          "stats",
          [](const SessionHandle& s) {
            return stats_view(without_gil([&] { return s.state().stats(); }));
          },
          "The fields of EngineStats; `degradations` is a dict.")
      .def("plan", [](const SessionHandle& s) { return plan_view(s.engine().plan()); })
      .def(
          "host_tier",
          [](const SessionHandle& s) {
            const HostTierProgress progress = without_gil([&] { return s.engine().host_tier(); });
            return std::tuple(progress.capacity_bytes, progress.filled_bytes, progress.pinned_bytes,
                              progress.pageable_bytes);
          },
          "(capacity, filled, pinned, unpinned for good) bytes; zeros without one.")
      .def(
          "timeline",
          [](const SessionHandle& s) {
            return timeline_view(without_gil([&] { return s.engine().timeline().snapshot(); }));
          },
          "(kind, begin_s, end_s, layer, expert, bytes, tokens), oldest first.")
      .def(
          "residency",
          [](const SessionHandle& s) {
            return residency_view(without_gil([&] { return s.engine().residency(); }));
          },
          "Per size class, per slot: (state, layer, expert, leases).")
      .def(
          "drain", [](const SessionHandle& s) { s.engine().drain(); }, WithoutGil())
      .def("close", &SessionHandle::close, WithoutGil())
      .def_property_readonly("closed", &SessionHandle::closed)
      .def_property_readonly(
          "inside", [](const SessionHandle& s) { return s.engine().is_inside(); },
          "Whether this thread is in a callback of one of its forwards.")
      .def(
          "take_error",
          [](const SessionHandle& s) {
            return python_error(without_gil([&] { return s.state().take_error(); }));
          },
          "As the function of that name; also of a session that was closed meanwhile.");
  m.def("take_error", &taken_error, py::arg("handle"),
        "The exception that the calling thread's last failed forward left; taken once.");
  m.def("forward", &forward, py::arg("handle"), py::arg("layer"), py::arg("num_tokens"),
        py::arg("top_k"), py::arg("columns"), py::arg("activations"), py::arg("weights_dtype"),
        py::arg("hidden"), py::arg("expert_ids"), py::arg("weights"), py::arg("out"),
        py::arg("device") = -1, py::arg("stream") = 0, WithoutGil(),
        "What the bridge calls, by handle; errors are raised as they are.");
  m.def("plan_memory", &plan_of, py::arg("budget_bytes"), py::arg("layers"),
        "What a budget buys for layers of (slot_bytes, num_experts).");
  py::module_::import("atexit").attr("register")(
      py::cpp_function(&close_all_sessions, WithoutGil()));
}

}  // namespace sluice::bindings
