#include "bindings/session_state.h"

#include <unistd.h>

#include <utility>

#include "bindings/devices.h"
#include "bindings/torch_bridge.h"
#include "device/nvtx.h"

namespace sluice::bindings {

SharedPyObject share(py::object object) {
  if (object.is_none()) return nullptr;
  return {new py::object(std::move(object)), [](py::object* held) {
            // After the interpreter's end there is no GIL to take and nothing to give back to.
            if (Py_IsInitialized() == 0) {
              (void)held->release();
            } else {
              const py::gil_scoped_acquire gil;
              *held = py::object();
            }
            delete held;
          }};
}

SessionState::SessionState(std::shared_ptr<const ExpertStore> store,
                           const std::string& torch_device, EngineOptions options,
                           std::vector<GateSettings> gates, bool nvtx)
    : process_id_(getpid()), torch_device_(torch_device) {
  std::vector<LayerSpec> layers;
  layers.reserve(gates.size());
  for (const GateSettings& settings : gates) layers.push_back(make_layer(settings));
  Engine::Parts parts;
  parts.store = std::move(store);
  EngineDevice opened = open_device(torch_device);
  parts.device = std::move(opened.device);
  parts.compute = std::move(opened.compute);
  if (nvtx) parts.ranges = make_nvtx_ranges();
  parts.parallel = make_parallel();
  parts.gemm = [](void* context, const GemmCall& call) {
    return static_cast<SessionState*>(context)->gemm(call);
  };
  parts.gemm_context = this;
  parts.interrupted = [this] { return interrupted(); };
  engine_ = std::make_unique<Engine>(std::move(options), std::move(parts), std::move(layers));
}

SessionState::~SessionState() {
  if (is_inherited()) (void)engine_.release();
}

bool SessionState::is_inherited() const noexcept { return getpid() != process_id_; }

std::exception_ptr SessionState::inherited_error() const {
  return std::make_exception_ptr(Error("session opened in process " + std::to_string(process_id_) +
                                       ", this is process " + std::to_string(getpid()) +
                                       "; make a new one here"));
}

Engine& SessionState::engine() const {
  if (is_inherited()) std::rethrow_exception(inherited_error());
  return *engine_;
}

LayerSpec SessionState::make_layer(const GateSettings& settings) {
  LayerSpec layer;
  layer.gate = settings.spec;
  if (settings.gate_callback) layer.gate_callback = make_callback(settings.gate_callback);
  if (settings.post_callback) layer.post_expert_callback = make_callback(settings.post_callback);
  return layer;
}

ExpertCallback SessionState::make_callback(const SharedPyObject& fn) {
  return [this, fn](LayerIdx layer, DType dtype, std::int64_t rows, std::int64_t in_columns,
                    std::int64_t out_columns, const void* in, void* out) {
    const auto call = [&](const void* source, void* target) {
      const py::gil_scoped_acquire gil;
      try {
        (*fn)(to_int(layer), std::string(dtype_name(dtype)), rows, in_columns, out_columns,
              reinterpret_cast<std::uint64_t>(source), reinterpret_cast<std::uint64_t>(target));
        return 0;
      } catch (const std::exception&) {
        keep_error(std::current_exception());
        return 1;
      }
    };
    const auto bytes = [&](std::int64_t columns) {
      return static_cast<std::size_t>(rows * columns) * element_bytes(dtype);
    };
    return call_on_tensors(bytes(in_columns), bytes(out_columns), in, out, call);
  };
}

ForwardArgs SessionState::checked(const SluiceForwardCall& call) const {
  const ExpertStore& store = engine_->store();
  require<ConfigError>(call.layer >= 0 && call.layer < store.num_layers(), [&] {
    return "layer: got " + std::to_string(call.layer) + ", expected 0 to " +
           std::to_string(store.num_layers() - 1);
  });
  const LayerIdx layer{static_cast<std::int32_t>(call.layer)};
  const std::int64_t hidden = store.layer(layer).layout.hidden;
  require<ConfigError>(call.columns == hidden, [&] {
    return "hidden: got " + std::to_string(call.columns) + " columns, expected " +
           std::to_string(hidden) + " as layer " + std::to_string(call.layer) + " has";
  });
  require<ConfigError>(call.num_tokens >= 0 && call.top_k >= 0, [&] {
    return "tokens: got " + std::to_string(call.num_tokens) + " with " +
           std::to_string(call.top_k) + " experts each, expected 0 or more";
  });
  const std::string device = call.device < 0 ? "cpu" : "cuda:" + std::to_string(call.device);
  require<ConfigError>(device == torch_device_, [&] {
    return "hidden: got tensors on " + device + ", expected " + torch_device_ +
           ", where the session was opened; move them, or open a session there";
  });
  const auto dtype = [](std::int32_t number, const char* what) {
    require<ConfigError>(number >= 0 && number <= 2, [&] {
      return std::string(what) + ": got dtype " + std::to_string(number) + ", expected 0, 1 or 2";
    });
    return static_cast<DType>(number);
  };
  return {.layer = layer,
          .num_tokens = call.num_tokens,
          .top_k = call.top_k,
          .activations = dtype(call.activations, "hidden"),
          .weights_dtype = dtype(call.weights_dtype, "weights"),
          .hidden = call.hidden,
          .expert_ids = call.expert_ids,
          .weights = call.weights,
          .out = call.out,
          .stream = StreamHandle{call.stream}};
}

std::int32_t SessionState::forward(const SluiceForwardCall& call) noexcept {
  // In a forked child another thread of the parent may have held `mu_` for ever: touch nothing.
  if (is_inherited()) return 1;
  (void)take_error();
  try {
    const ForwardArgs args = checked(call);
    if (args.num_tokens > 0) forward_tensors(*engine_, args);
    return 0;
  } catch (const std::exception&) {
    keep_error(std::current_exception());
    return 1;
  }
}

void SessionState::keep_error(std::exception_ptr error) {
  const MutexLock lock(mu_);
  errors_.try_emplace(std::this_thread::get_id(), std::move(error));
}

std::exception_ptr SessionState::take_error() {
  if (is_inherited()) return inherited_error();
  const MutexLock lock(mu_);
  const auto node = errors_.extract(std::this_thread::get_id());
  return node.empty() ? nullptr : node.mapped();
}

int SessionState::gemm(const GemmCall& call) noexcept {
  const GemmRoute route = gemm_route();
  if (route == GemmRoute::kPython) ++python_gemm_calls_;
  if (route == GemmRoute::kReference) ++reference_gemm_calls_;
  try {
    multiply(route, call);
    return 0;
  } catch (const std::exception&) {
    keep_error(std::current_exception());
    return 1;
  }
}

bool SessionState::interrupted() noexcept {
  const py::gil_scoped_acquire gil;
  if (PyErr_CheckSignals() == 0) return false;
  keep_error(std::make_exception_ptr(py::error_already_set()));
  return true;
}

EngineStats SessionState::stats() const {
  EngineStats stats = engine().stats();
  const auto count = [&](const char* name, std::int64_t calls) {
    if (calls > 0) stats.degradations[name] += calls;
  };
  count("python_gemm", python_gemm_calls_.load());
  count("reference_gemm", reference_gemm_calls_.load());
  return stats;
}

void SessionState::close() {
  if (is_inherited()) return;
  engine_->close();
  closed_.store(true);
}

}  // namespace sluice::bindings
