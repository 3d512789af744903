#pragma once

#include <cstdint>
#include <functional>
#include <limits>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "base/bytes.h"
#include "base/clock.h"
#include "base/parallel.h"
#include "cache/slot_cache.h"
#include "device/device.h"
#include "engine/compute.h"
#include "engine/forward.h"
#include "engine/hint.h"
#include "engine/host_tier.h"
#include "engine/memory_plan.h"
#include "engine/scorer.h"
#include "engine/stats.h"
#include "engine/timeline.h"
#include "kernels/gemm.h"
#include "store/expert_store.h"
#include "transfer/transfer_path.h"

namespace sluice {

/// The user's settings, mirrored field by field by `sluice.config.OffloadOptions` (a test
/// compares).
struct EngineOptions {
  std::uint64_t device_memory = 0;  ///< bytes for resident experts
  /// Bytes of RAM for the host tier beside a device with memory of its own; unused without one.
  std::uint64_t host_memory = 0;
  /// "inclusive": the host tier holds what fits, device slots or not. "none": RAM is staging alone.
  std::string host_tier = "inclusive";
  /// Bytes of the host tier that may be pinned.
  std::uint64_t pinned_cap = std::numeric_limits<std::uint64_t>::max();
  /// "stream": a call of more than half of a layer goes through a ring of slots. "cache": through
  /// all of them.
  std::string prefill = "stream";
  std::string policy = "decayed-lfu";
  int io_threads = 4;  ///< chunks in flight on the disk
  bool timeline = true;
};

/// Store, transfer engine, slot cache and kernels as one session.
///
/// `forward` groups rows by expert, leases residents, demands the rest, computes ready experts
/// first and each miss as it lands, and combines in k order; in waves when a layer needs more
/// experts than there are slots, through a ring of max(2, ⌈S/8⌉) slots when a call needs more than
/// half of its layer. Results never depend on any of this (law 1).
///
/// Thread safety: every member; forwards are serialised.
/// On an accelerator `forward` returns when all is enqueued on the call's stream; it waits for the
/// ids of the call, and for loads to be enqueued where experts are missing.
///
/// Errors: CapacityError when made with too small a budget; from forward: the transfer's own error
/// (the session stays usable), Interrupted, SluiceError once closed; ConfigError on a stream that
/// is being captured; DeviceError, after which the session is usable unless the error is for good.
class Engine {
 public:
  struct Parts {
    std::shared_ptr<const ExpertStore> store;
    std::unique_ptr<Device> device;
    /// How experts come into slots. Null: a reader pool straight into a host device's slots, or the
    /// host tier's copies where the device has memory of its own.
    std::unique_ptr<TransferPath> path;
    std::unique_ptr<ExpertCompute> compute;   ///< null: the host's kernels
    std::size_t copy_chunk_bytes = 4 * kMiB;  ///< what a copy engine is given at once
    std::unique_ptr<ParallelFor> parallel;    ///< null: serial
    std::shared_ptr<const Clock> clock;       ///< null: the steady clock
    GemmFn gemm = nullptr;                    ///< null: the reference GEMM
    void* gemm_context = nullptr;
    std::unique_ptr<Ranges> ranges;  ///< null: spans are shown nowhere
    /// Asked every 50 ms of a stall on the caller's thread; true ends the forward (Ctrl-C).
    std::function<bool()> interrupted;
    /// For a link without threads: called, without a lock, where a call would wait for bytes; makes
    /// some land (stepped device, link model). `interrupted` is then asked each time.
    std::function<void()> drive;
  };

  Engine(EngineOptions options, Parts parts, std::vector<LayerSpec> layers);
  ~Engine();
  Engine(const Engine&) = delete;
  Engine& operator=(const Engine&) = delete;

  void forward(const ForwardArgs& args);
  /// Queues guesses; those that cannot be taken are dropped and counted.
  void hint(std::span<const Hint> hints);
  /// Has a scorer guess and rank inside of forwards from the next one on, beside those that do. The
  /// number to remove it by.
  /// Errors: ConfigError on one for another model, or one that reads what does not lie in RAM.
  std::int64_t add_scorer(std::unique_ptr<Scorer> scorer);
  /// Nothing where there is none of that number.
  void remove_scorer(std::int64_t number);
  /// Tells the scorers whose rows the next layers are of.
  void begin_step(const StepRows& rows);
  /// Hands keep-scores, whole rows of layers from `first_layer` on, to the cache policies
  /// ("forecast" reads them, most do not), as made `age_steps` forwards ago. Errors: ConfigError on
  /// rows outside of the model.
  void publish(LayerIdx first_layer, std::span<const float> scores, std::int64_t age_steps = 0);
  /// Drives transfers when the link has no threads of its own (stepped device, link model).
  Nanos step();

  [[nodiscard]] EngineStats stats() const;
  [[nodiscard]] const MemoryPlan& plan() const noexcept;
  [[nodiscard]] HostTierProgress host_tier() const;
  [[nodiscard]] const ExpertStore& store() const noexcept;
  [[nodiscard]] const Timeline& timeline() const noexcept;
  /// Slots of every size class, for the residency map.
  [[nodiscard]] std::vector<std::vector<SlotCache::SlotView>> residency() const;
  /// Whether the calling thread is inside of a forward of this engine: in a callback, that is.
  [[nodiscard]] bool is_inside() const;
  /// Waits until nothing is in flight: hints are cancelled, demands awaited.
  void drain();
  /// Idempotent. Running calls finish first; queued work is cancelled, reads in flight awaited;
  /// threads are joined; every byte, stream and event is returned.
  void close();

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace sluice
