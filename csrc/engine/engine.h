#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "base/clock.h"
#include "base/parallel.h"
#include "cache/slot_cache.h"
#include "device/device.h"
#include "engine/hint.h"
#include "engine/memory_plan.h"
#include "engine/stats.h"
#include "engine/timeline.h"
#include "kernels/gate.h"
#include "kernels/gemm.h"
#include "store/expert_store.h"
#include "transfer/link.h"

namespace sluice {

/// The user's settings, mirrored field by field by `sluice.config.OffloadOptions` (a test
/// compares).
struct EngineOptions {
  std::uint64_t device_memory = 0;  ///< bytes for resident experts
  std::string policy = "decayed-lfu";
  int io_threads = 4;  ///< chunks in flight on the disk
  bool timeline = true;
};

/// What a layer computes beyond its stored matrices.
struct LayerSpec {
  GateSpec gate;
  /// For kGeneric: out[M, I] of in[M, 2I] in the activations' type, on the caller's thread. Returns
  /// 0, or a code that ends the forward with InternalError (Python raises the original).
  std::function<int(LayerIdx layer, DType dtype, std::int64_t rows, std::int64_t in_columns,
                    std::int64_t out_columns, const void* in, void* out)>
      gate_callback;
  /// Same shape of call after the second GEMM, [M, H] → [M, H]; empty: none (Muse Spark's norm).
  decltype(gate_callback) post_expert_callback;
};

/// One call of one MoE layer.
struct ForwardArgs {
  LayerIdx layer{};
  std::int64_t num_tokens = 0;  // T
  std::int64_t top_k = 0;       // K
  DType activations = DType::kF32;
  DType weights_dtype = DType::kF32;         // of the routing weights
  const void* hidden = nullptr;              // [T, H]
  const std::int64_t* expert_ids = nullptr;  // [T, K]; ids ≥ E (or < 0) contribute zero
  const void* weights = nullptr;             // [T, K]
  void* out = nullptr;                       // [T, H]
};

/// Store, transfer engine, slot cache and kernels as one session.
///
/// `forward` groups rows by expert, leases residents, demands the rest, computes ready experts
/// first and each miss as it lands, and combines in k order; in waves when a layer needs more
/// experts than there are slots, through a ring of max(2, ⌈S/8⌉) slots when a call needs more than
/// half of its layer. Results never depend on any of this (law 1).
///
/// Thread safety: every member; forwards are serialised.
/// Errors: CapacityError when made with too small a budget; from forward: the transfer's own error
/// (the session stays usable), Interrupted, SluiceError once closed.
class Engine {
 public:
  struct Parts {
    std::shared_ptr<const ExpertStore> store;
    std::unique_ptr<Device> device;
    std::unique_ptr<Link> link;             ///< null: a reader pool over the store
    std::unique_ptr<ParallelFor> parallel;  ///< null: serial
    std::shared_ptr<const Clock> clock;     ///< null: the steady clock
    GemmFn gemm = nullptr;                  ///< null: the reference GEMM
    void* gemm_context = nullptr;
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
  /// Drives transfers when the link has no threads of its own (stepped device, link model).
  Nanos step();

  [[nodiscard]] EngineStats stats() const;
  [[nodiscard]] const MemoryPlan& plan() const noexcept;
  [[nodiscard]] const ExpertStore& store() const noexcept;
  [[nodiscard]] const Timeline& timeline() const noexcept;
  /// Slots of every size class, for the residency map.
  [[nodiscard]] std::vector<std::vector<SlotCache::SlotView>> residency() const;
  /// Whether the calling thread is inside of a forward of this engine: in a callback, that is.
  [[nodiscard]] bool is_inside() const;
  /// Waits until nothing is in flight: hints are cancelled, demands awaited.
  void drain();
  /// Idempotent. Running calls finish first; queued work is cancelled, reads in flight awaited;
  /// threads are joined and every byte is returned.
  void close();

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace sluice
