#include "simulate/timed_run.h"

#include <algorithm>
#include <cmath>
#include <functional>
#include <memory>
#include <string>
#include <utility>

#include "base/bytes.h"
#include "base/error.h"
#include "engine/engine.h"
#include "store/expert_store.h"
#include "transfer/transfer_path.h"

namespace sluice {
namespace {

constexpr std::size_t kChunkBytes = 4096;  // the smallest that a store has
constexpr std::int64_t kWidth = 32;        // three matrices of 32 x 32 floats make three chunks

/// Experts of a few small chunks, all over the same bytes: enough for a store.
struct SmallStore {
  SmallStore(const Routes& routes, std::int32_t num_chunks)
      : memory(static_cast<std::size_t>(num_chunks) * kChunkBytes + 4) {
    ExpertStoreBuilder builder({.chunk_bytes = kChunkBytes});
    const ExpertLayout layout{.dtype = DType::kF32,
                              .hidden = kWidth,
                              .intermediate = kWidth * num_chunks / 3,
                              .gated = true,
                              .has_bias = false};
    // Four bytes off, so that no expert is used where it lies.
    const auto place = reinterpret_cast<std::uint64_t>(memory.data()) + 4;
    for (std::int32_t l = 0; l < routes.num_layers; ++l) {
      builder.add_layer({.name = "layer " + std::to_string(l),
                         .num_experts = routes.max_experts,
                         .layout = layout});
      for (std::int32_t e = 0; e < routes.max_experts; ++e) {
        builder.add_piece(make_key(l, e), {.offset = place,
                                           .bytes = layout.bytes(),
                                           .target_offset = 0,
                                           .transform = Piece::Transform::kCopy});
      }
    }
    store = builder.build();
  }
  std::vector<std::byte> memory;
  std::shared_ptr<const ExpertStore> store;
};

/// Takes time instead of computing.
class TimedCompute final : public ExpertCompute {
 public:
  TimedCompute(const TimedSettings& settings, LinkModel& link, std::function<void()> on_work)
      : dense_(static_cast<Nanos>(settings.dense_seconds * 1e9)),
        expert_(static_cast<Nanos>(settings.expert_seconds * 1e9)),
        link_(link),
        on_work_(std::move(on_work)) {}

  [[nodiscard]] const Grouping& begin(const ForwardArgs& args, const StoredLayer& layer,
                                      const LayerSpec& /*spec*/) override {
    link_.advance(dense_);
    grouping_.assign(args, layer.num_experts);
    return grouping_;
  }
  [[nodiscard]] bool takes_several(const Grouping::Group& /*group*/) const override { return true; }
  void several(std::span<const ReadyExpert> experts) override {
    on_work_();
    link_.advance(expert_ * static_cast<Nanos>(experts.size()));
  }
  void one(const ReadyExpert& expert) override { several({&expert, 1}); }
  void combine_rows() override { on_work_(); }
  void close() noexcept override {}
  [[nodiscard]] std::int64_t generic_gate_calls() const override { return 0; }
  [[nodiscard]] std::uint64_t workspace_bytes() const override { return 0; }

 private:
  Nanos dense_;
  Nanos expert_;
  LinkModel& link_;
  std::function<void()> on_work_;
  Grouping grouping_;
};

void check(const Routes& routes, const TimedSettings& settings, const GuessTable& guesses,
           std::span<const float> rows) {
  routes.check();
  const auto positive = [](double value) { return value > 0 && std::isfinite(value); };
  const auto not_negative = [](double value) { return value >= 0 && std::isfinite(value); };
  require<ConfigError>(settings.expert_bytes > 0 && settings.chunk_bytes > 0, [&] {
    return "simulate: got experts of " + std::to_string(settings.expert_bytes) +
           " bytes in chunks of " + std::to_string(settings.chunk_bytes) +
           ", expected at least 1 of each";
  });
  require<ConfigError>(
      positive(settings.link.bytes_per_second) && not_negative(settings.link.seconds_per_chunk) &&
          settings.link.depth >= 1,
      [&] {
        return "simulate: got a link of " + std::to_string(settings.link.bytes_per_second) +
               " bytes/s, " + std::to_string(settings.link.seconds_per_chunk) +
               " s a chunk, depth " + std::to_string(settings.link.depth) +
               ", expected a rate above 0, no negative time, depth 1 or more";
      });
  require<ConfigError>(
      not_negative(settings.dense_seconds) && not_negative(settings.expert_seconds),
      [] { return std::string("simulate: got a negative time of computing, expected 0 or more"); });
  const auto num_events = static_cast<std::size_t>(routes.num_events());
  require<ConfigError>(
      rows.empty() || rows.size() == num_events * static_cast<std::size_t>(routes.max_experts),
      [&] {
        return "simulate: got " + std::to_string(rows.size()) +
               " keep-scores, expected one row of " + std::to_string(routes.max_experts) +
               " for each of " + std::to_string(num_events) + " events";
      });
  if (guesses.begins.empty()) return;
  const std::size_t num_guesses = guesses.layers.size();
  bool rises =
      guesses.begins.size() == num_events + 1 && guesses.begins.front() == 0 &&
      std::cmp_equal(guesses.begins.back(), num_guesses) && guesses.experts.size() == num_guesses &&
      guesses.probabilities.size() == num_guesses && guesses.steps_ahead.size() == num_guesses;
  for (std::size_t i = 0; rises && i < num_events; ++i) {
    rises = guesses.begins[i] <= guesses.begins[i + 1];
  }
  require<ConfigError>(rises, [&] {
    return "simulate: got guesses that do not fit " + std::to_string(num_events) +
           " events, expected as many begins and one more, rising, and columns of one length";
  });
}

/// One run: the engine, and where it is in the routes.
class TimedRun {
 public:
  TimedRun(const Routes& routes, const TimedSettings& settings, const GuessTable& guesses,
           std::span<const float> rows)
      : routes_(routes),
        guesses_(guesses),
        rows_(rows),
        num_chunks_(chunks_of(settings)),
        store_(routes, num_chunks_),
        clock_(std::make_shared<VirtualClock>()) {
    const double scale = static_cast<double>(settings.expert_bytes) /
                         static_cast<double>(store_.store->layer(LayerIdx{0}).layout.bytes());
    auto link = std::make_unique<LinkModel>(settings.link, scale, *clock_);
    link_ = link.get();
    Engine::Parts parts;
    parts.store = store_.store;
    parts.clock = clock_;
    parts.path = make_direct_path(store_.store, std::move(link), *clock_);
    parts.compute = std::make_unique<TimedCompute>(settings, *link_, [this] { on_work(); });
    parts.drive = [this] {
      on_work();
      (void)link_->land_next();
    };
    std::vector<LayerSpec> specs(static_cast<std::size_t>(routes.num_layers));
    engine_ = std::make_unique<Engine>(
        EngineOptions{.device_memory = static_cast<std::uint64_t>(settings.num_slots) *
                                       store_.store->slot_bytes(LayerIdx{0}),
                      .policy = settings.policy,
                      .timeline = false},
        std::move(parts), std::move(specs));
  }

  [[nodiscard]] TimedResult run() {
    TimedResult result;
    for (std::size_t i = 0; i < routes_.steps.size(); ++i) {
      event_ = i;
      has_worked_ = false;
      forward(i);
      on_work();  // of an event without experts
      const EngineStats stats = engine_->stats();
      result.demand_bytes.push_back(stats.bytes_read_demand);
      result.wasted_bytes.push_back(stats.bytes_read_hint_wasted);
      const bool ends_step =
          i + 1 == routes_.steps.size() || routes_.steps[i + 1] != routes_.steps[i];
      if (ends_step) result.step_ends.push_back(clock_->now());
    }
    result.stats = engine_->stats();
    return result;
  }

 private:
  static std::int32_t chunks_of(const TimedSettings& settings) {
    const std::uint64_t chunks =
        (settings.expert_bytes + settings.chunk_bytes - 1) / settings.chunk_bytes;
    constexpr std::uint64_t kMost = 4096;
    require<ConfigError>(chunks <= kMost, [&] {
      return "simulate: got experts of " + std::to_string(chunks) + " chunks, expected at most " +
             std::to_string(kMost) + "; raise chunk_bytes";
    });
    return static_cast<std::int32_t>((chunks + 2) / 3 * 3);
  }

  void forward(std::size_t i) {
    const auto begin = static_cast<std::size_t>(routes_.begins[i]);
    const auto end = static_cast<std::size_t>(routes_.begins[i + 1]);
    ids_.assign(routes_.experts.begin() + static_cast<std::ptrdiff_t>(begin),
                routes_.experts.begin() + static_cast<std::ptrdiff_t>(end));
    ones_.assign(ids_.size(), 1.0F);
    // A token that chose each once: where it is one of a batch, the batch's distinct experts.
    engine_->forward({.layer = LayerIdx{routes_.layers[i]},
                      .num_tokens = 1,
                      .top_k = static_cast<std::int64_t>(ids_.size()),
                      .activations = DType::kF32,
                      .weights_dtype = DType::kF32,
                      .hidden = nullptr,
                      .expert_ids = ids_.data(),
                      .weights = ones_.data(),
                      .out = nullptr,
                      .stream = {}});
  }

  // The demands of the running event are on their way: now what was learnt from it.
  void on_work() {
    if (std::exchange(has_worked_, true)) return;
    const std::size_t i = event_;
    const auto width = static_cast<std::size_t>(routes_.max_experts);
    if (!rows_.empty()) {
      engine_->publish(LayerIdx{routes_.layers[i]}, rows_.subspan(i * width, width));
    }
    if (guesses_.begins.empty()) return;
    hints_.clear();
    for (auto j = static_cast<std::size_t>(guesses_.begins[i]);
         std::cmp_less(j, guesses_.begins[i + 1]); ++j) {
      hints_.push_back({.key = make_key(guesses_.layers[j], guesses_.experts[j]),
                        .probability = guesses_.probabilities[j],
                        .deadline = deadline(i, guesses_.layers[j], guesses_.steps_ahead[j])});
    }
    if (!hints_.empty()) engine_->hint(hints_);
  }
  [[nodiscard]] Nanos deadline(std::size_t i, std::int32_t layer, std::int32_t steps) const {
    if (std::cmp_less(i, routes_.num_layers)) return kNever;
    const double per_event = static_cast<double>(clock_->now()) / static_cast<double>(i);
    const double events =
        static_cast<double>(steps) * routes_.num_layers + layer - routes_.layers[i];
    return clock_->now() + static_cast<Nanos>(std::max(0.0, events) * per_event);
  }

  const Routes& routes_;
  const GuessTable& guesses_;
  std::span<const float> rows_;
  std::int32_t num_chunks_;
  SmallStore store_;
  std::shared_ptr<VirtualClock> clock_;
  LinkModel* link_ = nullptr;
  std::unique_ptr<Engine> engine_;
  std::size_t event_ = 0;
  bool has_worked_ = false;
  std::vector<std::int64_t> ids_;
  std::vector<float> ones_;
  std::vector<Hint> hints_;
};

}  // namespace

TimedResult run_timed(const Routes& routes, const TimedSettings& settings,
                      const GuessTable& guesses, std::span<const float> rows) {
  check(routes, settings, guesses, rows);
  return TimedRun(routes, settings, guesses, rows).run();
}

}  // namespace sluice
