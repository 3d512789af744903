#include "engine/engine.h"

#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <new>
#include <string>
#include <utility>

#include "base/error.h"
#include "base/log_ring.h"
#include "engine/expert_loader.h"
#include "engine/host_compute.h"
#include "engine/layer_run.h"
#include "engine/staged_path.h"
#include "engine/turn.h"
#include "transfer/disk_link.h"

namespace sluice {
namespace {

Engine::Parts with_defaults(Engine::Parts parts, const EngineOptions& options) {
  require<ConfigError>(parts.store != nullptr, [] {
    return std::string("engine: got no store, expected the experts' bytes");
  });
  require<ConfigError>(options.io_threads >= 1, [&] {
    return "io_threads: got " + std::to_string(options.io_threads) + ", expected 1 or more";
  });
  if (!parts.device) parts.device = make_host_device();
  if (!parts.parallel) parts.parallel = std::make_unique<SerialFor>();
  if (!parts.clock) parts.clock = std::make_shared<SteadyClock>();
  if (parts.gemm == nullptr) parts.gemm = &reference_gemm;
  if (!parts.compute) {
    parts.compute = std::make_unique<HostCompute>(*parts.parallel, parts.gemm, parts.gemm_context);
  }
  require<ConfigError>(options.host_tier == "inclusive" || options.host_tier == "none", [&] {
    return "host_tier: got \"" + options.host_tier + "\", expected \"inclusive\" or \"none\"";
  });
  require<ConfigError>(options.prefill == "stream" || options.prefill == "cache", [&] {
    return "prefill: got \"" + options.prefill + "\", expected \"stream\" or \"cache\"";
  });
  return parts;
}

void check_layers(const ExpertStore& store, const std::vector<LayerSpec>& layers) {
  require<ConfigError>(std::cmp_equal(layers.size(), store.num_layers()), [&] {
    return "engine: got " + std::to_string(layers.size()) +
           " layer specs, expected one for each of " + std::to_string(store.num_layers()) +
           " stored layers";
  });
  for (std::int32_t l = 0; l < store.num_layers(); ++l) {
    const LayerSpec& spec = layers[static_cast<std::size_t>(l)];
    const StoredLayer& layer = store.layer(LayerIdx{l});
    const bool generic = spec.gate.kind == GateKind::kGeneric;
    require<ConfigError>(!generic || spec.gate_callback != nullptr, [&] {
      return layer.name + ": got a generic gate without a callback, expected one to compute it";
    });
    require<ConfigError>(generic || is_gated(spec.gate.kind) == layer.layout.gated, [&] {
      return layer.name + ": got the gate " + std::string(gate_name(spec.gate.kind)) + " over " +
             (layer.layout.gated ? "gated" : "ungated") + " weights, expected both alike";
    });
  }
}

/// Experts that live in adopted memory need no slot when everything fits; beside an accelerator
/// they do, since its kernels read its own memory.
bool reads_in_place(const ExpertStore& store, Device& device, std::uint64_t budget_bytes) {
  return device.traits().slots_in_ram && budget_bytes >= store.total_slot_bytes();
}

std::vector<LayerBytes> slot_demand(const ExpertStore& store, bool use_in_place) {
  std::vector<LayerBytes> demand;
  for (std::int32_t l = 0; l < store.num_layers(); ++l) {
    const std::int32_t num_experts = store.layer(LayerIdx{l}).num_experts;
    std::int32_t in_slots = 0;
    for (std::int32_t e = 0; e < num_experts; ++e) {
      if (!use_in_place || !store.in_place(make_key(l, e))) ++in_slots;
    }
    demand.push_back({.slot_bytes = store.slot_bytes(LayerIdx{l}), .num_experts = in_slots});
  }
  return demand;
}

/// Host slots without a tier: one being read, one being copied, one between.
constexpr std::int32_t kStagingSlots = 3;

MemoryPlan plan_host(const ExpertStore& store, Device& device, const EngineOptions& options) {
  if (device.traits().slots_in_ram) return {};
  const std::vector<LayerBytes> demand = slot_demand(store, false);
  if (options.host_tier == "none") return plan_staging(kStagingSlots, demand);
  return plan_memory(options.host_memory, demand, "host_memory");
}

}  // namespace

struct Engine::Impl {
  Impl(EngineOptions engine_options, Parts engine_parts, std::vector<LayerSpec> layer_specs)
      : options(std::move(engine_options)),
        parts(with_defaults(std::move(engine_parts), options)),
        layers(std::move(layer_specs)),
        use_in_place(reads_in_place(*parts.store, *parts.device, options.device_memory)),
        plan(plan_memory(options.device_memory, slot_demand(*parts.store, use_in_place))),
        host_plan(plan_host(*parts.store, *parts.device, options)),
        timeline(options.timeline ? std::size_t{1} << 16 : 0, parts.ranges.get()),
        loader(
            parts.store, *parts.device, [this] { return take_path(); }, *parts.clock,
            options.policy, plan, timeline, parts.drive),
        run({.store = *parts.store,
             .device = *parts.device,
             .clock = *parts.clock,
             .timeline = timeline,
             .loader = loader,
             .compute = *parts.compute,
             .interrupted = parts.interrupted,
             .use_in_place = use_in_place,
             .streams = options.prefill == "stream",
             .warms = !parts.device->traits().slots_in_ram,
             .asks_each_time = parts.drive != nullptr}) {
    check_layers(*parts.store, layers);
    loader.step();  // the host tier begins to fill
  }

  /// Of the loader, which has taken the device's slots by then: what a GPU refuses costs no RAM.
  std::unique_ptr<TransferPath> take_path() {
    if (parts.path) return std::move(parts.path);
    if (parts.device->traits().slots_in_ram) {
      return make_direct_path(parts.store, make_disk_link(parts.store, options.io_threads),
                              *parts.clock);
    }
    const bool fills = options.host_tier != "none";
    auto path = make_staged_path(
        {.store = parts.store,
         .device = *parts.device,
         .clock = *parts.clock,
         .host = std::make_unique<HostTier>(
             host_plan, *parts.store, options.policy, *parts.device,
             HostTier::Options{.pinned_cap_bytes = options.pinned_cap, .fills = fills}),
         .store_link = make_disk_link(parts.store, options.io_threads, parts.device.get()),
         .copy_chunk_bytes = parts.copy_chunk_bytes,
         .copy_link = nullptr});
    staged = path.get();
    return path;
  }

  [[nodiscard]] bool in_forked_child() const { return getpid() != owner_pid; }

  const EngineOptions options;
  Parts parts;
  const std::vector<LayerSpec> layers;
  const bool use_in_place;
  const MemoryPlan plan;
  const MemoryPlan host_plan;
  StagedPath* staged = nullptr;  // the loader's, where there is a host tier
  Timeline timeline;
  ExpertLoader loader;
  LayerRun run;
  Turn turn;
  std::atomic<bool> closed{false};
  std::exception_ptr device_failure;  // of the turn: the first one, for good
  const pid_t owner_pid = getpid();
};

Engine::Engine(EngineOptions options, Parts parts, std::vector<LayerSpec> layers)
    : impl_(std::make_unique<Impl>(std::move(options), std::move(parts), std::move(layers))) {}

// In a forked child the threads are gone and their locks may be held for ever: leave it all alone.
Engine::~Engine() {
  if (impl_->in_forked_child()) {
    (void)impl_.release();
    return;
  }
  try {
    close();
  } catch (const std::exception& error) {  // the parts still return what they own
    log_ring().log(LogLevel::kError, error.what());
  }
}

namespace {

void check_args(const ForwardArgs& args, const ExpertStore& store) {
  require<ConfigError>(to_int(args.layer) >= 0 && to_int(args.layer) < store.num_layers(), [&] {
    return "forward: got layer " + std::to_string(to_int(args.layer)) + ", expected one below " +
           std::to_string(store.num_layers());
  });
  require<ConfigError>(args.num_tokens >= 0 && args.top_k >= 0, [&] {
    return "forward: got " + std::to_string(args.num_tokens) + " tokens and " +
           std::to_string(args.top_k) + " experts per token, expected none below zero";
  });
}

void check_scorer(const Scorer::Shape& shape, const ExpertStore& store, Device& device) {
  std::int32_t num_experts = 0;
  bool same_width = shape.num_layers == store.num_layers();
  for (std::int32_t l = 0; l < store.num_layers(); ++l) {
    const StoredLayer& layer = store.layer(LayerIdx{l});
    num_experts = std::max(num_experts, layer.num_experts);
    same_width = same_width && (shape.width == 0 || layer.layout.hidden == shape.width);
  }
  require<ConfigError>(same_width && shape.num_experts == num_experts, [&] {
    return "scorer: got one for " + std::to_string(shape.num_layers) + " layers of " +
           std::to_string(shape.num_experts) + " experts, width " + std::to_string(shape.width) +
           ", expected " + std::to_string(store.num_layers()) + " of " +
           std::to_string(num_experts) + " and the model's width";
  });
  const bool in_ram = device.traits().slots_in_ram;
  require<ConfigError>(in_ram || (shape.width == 0 && !shape.reads_weights), [] {
    return std::string(
        "scorer: got one that reads hidden states or routing weights beside a device with memory "
        "of its own, expected one that reads routes");
  });
}

}  // namespace

void Engine::forward(const ForwardArgs& args) {
  Impl& impl = *impl_;
  require<Error>(!impl.in_forked_child(), [] {
    return std::string(
        "forward: the session was made before this process was forked; make one in the child");
  });
  check_args(args, *impl.parts.store);
  const TurnGuard guard(impl.turn, "forward", impl.parts.interrupted);
  require<Error>(!impl.closed, [] { return std::string("forward: session closed"); });
  if (impl.device_failure) std::rethrow_exception(impl.device_failure);
  const DeviceScope here(*impl.parts.device);
  require<ConfigError>(!impl.parts.device->is_capturing(args.stream), [] {
    return std::string(
        "forward: got a stream that is being captured, expected one that runs; a graph would "
        "replay the experts of today. Do not capture a MoE layer (compile without "
        "\"reduce-overhead\", or set disable_compile=True)");
  });
  const Timeline::Shown shown(impl.timeline, SpanKind::kForward, {args.layer, ExpertIdx{-1}});
  const Nanos begin = impl.parts.clock->now();
  try {
    impl.run.run(args, impl.layers[static_cast<std::size_t>(to_int(args.layer))]);
  } catch (const DeviceError& error) {
    if (error.is_for_good()) impl.device_failure = std::current_exception();
    throw;
  }
  impl.timeline.add({.kind = SpanKind::kForward,
                     .begin = begin,
                     .end = impl.parts.clock->now(),
                     .key = {args.layer, ExpertIdx{-1}},
                     .bytes = 0,
                     .tokens = static_cast<std::int32_t>(args.num_tokens)});
}

void Engine::hint(std::span<const Hint> hints) {
  if (!impl_->in_forked_child()) impl_->loader.hint(hints);
}

std::int64_t Engine::add_scorer(std::unique_ptr<Scorer> scorer) {
  Impl& impl = *impl_;
  if (impl.in_forked_child()) return 0;
  check_scorer(scorer->shape(), *impl.parts.store, *impl.parts.device);
  const TurnGuard guard(impl.turn, "add_scorer", impl.parts.interrupted);
  return impl.run.add_scorer(std::move(scorer));
}

void Engine::remove_scorer(std::int64_t number) {
  Impl& impl = *impl_;
  if (impl.in_forked_child()) return;
  const TurnGuard guard(impl.turn, "remove_scorer", impl.parts.interrupted);
  impl.run.remove_scorer(number);
}

void Engine::begin_step(const StepRows& rows) {
  Impl& impl = *impl_;
  if (impl.in_forked_child()) return;
  const TurnGuard guard(impl.turn, "begin_step", impl.parts.interrupted);
  impl.run.begin_step(rows);
}

void Engine::publish(LayerIdx first_layer, std::span<const float> scores, std::int64_t age_steps) {
  if (!impl_->in_forked_child()) impl_->loader.publish(first_layer, scores, age_steps);
}

Nanos Engine::step() { return impl_->in_forked_child() ? kNever : impl_->loader.step(); }

EngineStats Engine::stats() const {
  const Impl& impl = *impl_;
  EngineStats stats = impl.loader.stats();
  stats.workspace_bytes = impl.loader.workspace_bytes() + impl.parts.compute->workspace_bytes();
  stats.adopted_bytes = impl.parts.store->adopted_bytes();
  const StoreCounters counters = impl.parts.store->counters();
  const auto degraded = [&](const char* name, std::uint64_t count) {
    if (count > 0) stats.degradations[name] = static_cast<std::int64_t>(count);
  };
  degraded("buffered_reads", counters.buffered_reads);
  degraded("retried_reads", counters.retried_reads);
  if (impl.staged != nullptr) {
    stats.store_bytes_read = counters.bytes_read;
    const HostTierProgress host = impl.staged->host_tier();
    const StagedCounters staged = impl.staged->counters();
    stats.host_hits = staged.host_hits;
    stats.host_misses = staged.host_misses;
    stats.host_tier_bytes = host.capacity_bytes;
    stats.host_filled_bytes = host.filled_bytes;
    stats.pinned_bytes = host.pinned_bytes;
    degraded("host_fill_errors", static_cast<std::uint64_t>(staged.fill_errors));
    degraded("unpinned_host_bytes", host.pageable_bytes);
    degraded("pageable_copy_bytes", impl.staged->copies().pageable_bytes);
  }
  return stats;
}

const MemoryPlan& Engine::plan() const noexcept { return impl_->plan; }
HostTierProgress Engine::host_tier() const {
  return impl_->staged == nullptr ? HostTierProgress{} : impl_->staged->host_tier();
}
const ExpertStore& Engine::store() const noexcept { return *impl_->parts.store; }
const Timeline& Engine::timeline() const noexcept { return impl_->timeline; }

std::vector<std::vector<SlotCache::SlotView>> Engine::residency() const {
  return impl_->loader.residency();
}

bool Engine::is_inside() const { return !impl_->in_forked_child() && impl_->turn.is_mine(); }

void Engine::drain() {
  Impl& impl = *impl_;
  if (impl.in_forked_child()) return;
  const TurnGuard guard(impl.turn, "drain", nullptr);
  if (!impl.closed) impl.loader.drain();
}

void Engine::close() {
  Impl& impl = *impl_;
  if (impl.in_forked_child()) return;
  const TurnGuard guard(impl.turn, "close", nullptr);
  if (impl.closed.exchange(true)) return;
  impl.loader.close();
  impl.parts.compute->close();
  impl.parts.device->close();
}

}  // namespace sluice
