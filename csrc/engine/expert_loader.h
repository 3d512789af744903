#pragma once

#include <chrono>
#include <cstdint>
#include <exception>
#include <functional>
#include <memory>
#include <optional>
#include <span>
#include <vector>

#include "base/clock.h"
#include "base/mutex.h"
#include "cache/slot_cache.h"
#include "device/device.h"
#include "engine/hint_queue.h"
#include "engine/hint_trust.h"
#include "engine/memory_plan.h"
#include "engine/slot_pool.h"
#include "engine/stats.h"
#include "engine/timeline.h"
#include "store/expert_store.h"
#include "transfer/transfer_path.h"

namespace sluice {

/// A slot that one call may read until it gives it back.
struct Grant {
  SlotLease lease;
  const std::byte* data = nullptr;
  EventHandle ready{};  ///< the compute stream waits for it before reading (I3); {}: passed
};

/// How a load that the running call waits for has ended.
struct Landing {
  std::int32_t need = -1;
  TicketState state = TicketState::kPending;
  Grant grant;               ///< of kDone: nobody could evict the expert in between
  std::exception_ptr error;  ///< of kFailed
};

/// Brings experts into slots. All that the cache and the transfers tell each other passes here,
/// under one lock: who is resident, who is on the way, who waits for it, which guess may use the
/// link, and what all of it has cost.
///
/// One call (a layer's forward) runs at a time, on its own thread: `begin_call`, then `place` for
/// each miss, `take_landings` and `wait`, `give_back`, and `end_call` or `abandon_call`. Between
/// begin and end no guess takes a slot while a demand has none. Nothing here computes, or waits for
/// bytes while it holds the lock; the transfer engine is stepped and told to cancel outside of it,
/// because both may end loads on the calling thread.
///
/// Thread safety: every public member; those of a call belong to the thread that began it.
class ExpertLoader {
 public:
  using MakePath = std::function<std::unique_ptr<TransferPath>()>;
  /// `make_path` is called once the slots are there.
  ExpertLoader(std::shared_ptr<const ExpertStore> store, Device& device, const MakePath& make_path,
               const Clock& clock, std::string_view policy, const MemoryPlan& plan,
               Timeline& timeline, std::function<void()> drive);
  ~ExpertLoader();
  ExpertLoader(const ExpertLoader&) = delete;
  ExpertLoader& operator=(const ExpertLoader&) = delete;

  enum class Judgement : std::uint8_t { kHit, kLate, kMiss };
  /// Judges each expert once: residents are leased, all of them before any load begins (I7), loads
  /// on their way are joined. `experts` ascend and live in slots; the others match it: `needs` are
  /// the call's own numbers for them, `grants` and `judged` are filled.
  /// `tokens`: of a prompt of `num_tokens`, how many of them ask for each (CacheEvent).
  void begin_call(LayerIdx layer, std::span<const ExpertIdx> experts,
                  std::span<const std::int32_t> needs, std::span<Grant> grants,
                  std::span<Judgement> judged, std::span<const std::int64_t> tokens = {},
                  std::int64_t num_tokens = 1) EXCLUDES(mu_);

  enum class Placement : std::uint8_t {
    kStarted,  ///< a load has begun
    kJoined,   ///< one was on its way
    kReady,    ///< it has arrived meanwhile: `grant`
    kNoSlot,   ///< every slot (or the pinned one) is leased or loading
    kNotYet,   ///< its last load is still being reported: ask again in a moment
  };
  struct Placed {
    Placement what = Placement::kNoSlot;
    SlotIdx slot{};
    bool was_empty = false;
    Grant grant;
  };
  /// Begins the load of the call's need number `need`; starts no chunk: call `step`.
  [[nodiscard]] Placed place(ExpertKey key, std::int32_t need, std::optional<SlotIdx> pinned_to)
      EXCLUDES(mu_);
  [[nodiscard]] bool has_empty_slot(LayerIdx layer) const EXCLUDES(mu_);
  [[nodiscard]] std::int32_t num_slots(LayerIdx layer) const;
  /// Experts that these slots are for: of all layers whose experts have this size.
  [[nodiscard]] std::int32_t num_experts(LayerIdx layer) const;
  /// Cancels the least valuable load that nobody asked for, unless `wanted` of them are ending
  /// already. Whether one was cancelled.
  bool cancel_least_hint(LayerIdx layer, std::int32_t wanted) EXCLUDES(mu_);

  /// Appends what has ended for this call since the last time.
  void take_landings(std::vector<Landing>& landings) EXCLUDES(mu_);
  /// Counts ended loads, whoever they were for.
  [[nodiscard]] std::uint64_t epoch() const EXCLUDES(mu_);
  /// Returns when a load has ended since `seen`, or about `slice` later. On a link without threads
  /// it drives once instead. Errors: what broke the loader.
  void wait(std::uint64_t seen, std::chrono::nanoseconds slice) EXCLUDES(mu_);
  /// Whether a load has ended since `seen`, or is in flight. Errors: what broke the loader.
  [[nodiscard]] bool may_end(std::uint64_t seen) const EXCLUDES(mu_);

  /// Records the last use of slots of `layer` on the stream that reads them, one event for all,
  /// then ends the leases (I4). The leases end also when the device refuses the record.
  void give_back(std::span<Grant> grants, LayerIdx layer, StreamHandle stream) EXCLUDES(mu_);

  struct CallReport {
    std::int64_t num_tokens = 0;
    std::int64_t in_place_hits = 0;
    std::int64_t stall_ns = 0;
    std::int64_t compute_ns = 0;
    std::int64_t generic_gate_calls = 0;
    std::int64_t scorers_lost = 0;  ///< since the session began
    bool streamed = false;
  };
  /// Hands the link back to guesses and adds the call to the statistics.
  void end_call(const CallReport& report) EXCLUDES(mu_);
  /// The same for a call that failed: its loads are cancelled as far as they have not started; what
  /// has started lands and frees its slot.
  void abandon_call(const CallReport& report) EXCLUDES(mu_);

  void hint(std::span<const Hint> hints) EXCLUDES(mu_);
  void publish(LayerIdx first_layer, std::span<const float> scores, std::int64_t age_steps)
      EXCLUDES(mu_);
  /// The same of the loader's own making: only what is not here counts as a guess.
  void hint_absent(std::vector<Hint>& hints) EXCLUDES(mu_);
  Nanos step() EXCLUDES(mu_);
  /// Cancels guesses and waits until nothing is in flight. No call may be running.
  void drain() EXCLUDES(mu_);
  /// As drain, for good: demands are cancelled too, threads joined, slots emptied and freed, also
  /// where the device is gone.
  void close() EXCLUDES(mu_);

  [[nodiscard]] EngineStats stats() const EXCLUDES(mu_);
  [[nodiscard]] std::vector<std::vector<SlotCache::SlotView>> residency() const;
  [[nodiscard]] std::uint64_t workspace_bytes() const { return path_->workspace_bytes(); }

 private:
  void finished(const LoadRequest& request, TicketState state, std::exception_ptr error,
                std::uint64_t bytes_read) EXCLUDES(mu_);
  /// Waits for the kernels behind an event. Errors are logged: false, and nobody asks again.
  [[nodiscard]] bool synchronize_at_end(EventHandle event) noexcept;
  [[nodiscard]] SlotPool& pool_of(LayerIdx layer) const;
  /// Whether a layer's experts live in slots; not where all of them are used in adopted memory.
  [[nodiscard]] bool class_has_slots(LayerIdx layer) const;
  /// Whether there is such an expert, and its layer has slots.
  [[nodiscard]] bool lives_in_slots(ExpertKey key) const;
  [[nodiscard]] std::int32_t& slot_of_locked(ExpertKey key) REQUIRES(mu_);
  [[nodiscard]] Grant grant_locked(SlotPool& pool, SlotLease lease) REQUIRES(mu_);
  /// Of an expert that was here before: most of the time nothing is left to wait for.
  [[nodiscard]] Grant grant_resident_locked(SlotPool& pool, ExpertKey key) REQUIRES(mu_);
  void ask_for_locked(SlotRecord& record) REQUIRES(mu_);
  void join_locked(ExpertKey key, SlotRecord& record, std::int32_t need) REQUIRES(mu_);
  void submit_locked(SlotPool& pool, SlotIdx slot, const LoadRequest& request, std::int32_t need)
      REQUIRES(mu_);
  void vacate_locked(SlotPool& pool, SlotRecord& record) REQUIRES(mu_);
  void account_locked(const SlotRecord& record, TicketState state, std::uint64_t bytes_read)
      REQUIRES(mu_);
  void finish_call_locked(const CallReport& report) REQUIRES(mu_);
  void feed_hints_locked() REQUIRES(mu_);
  /// False when there is no room: the guess goes on waiting.
  [[nodiscard]] bool take_hint_locked(const Hint& hint) REQUIRES(mu_);
  void wait_for_end(std::uint64_t seen, std::chrono::nanoseconds slice) EXCLUDES(mu_);
  void wait_until_idle() EXCLUDES(mu_);  // or broken: then loads may never end
  /// What an exception on a thread that nobody waits for becomes: the running call's error, and
  /// every later one's.
  void break_down(std::exception_ptr error) EXCLUDES(mu_);

  const std::shared_ptr<const ExpertStore> store_;
  Device& device_;
  const Clock& clock_;
  Timeline& timeline_;
  const std::function<void()> drive_;
  std::unique_ptr<TransferPath> path_;  // from the constructor on
  const std::vector<std::int32_t> class_of_layer_;
  std::vector<std::int32_t> experts_of_class_;
  std::int32_t max_experts_ = 0;  // of any layer
  /// Records of every pool are guarded by mu_; the caches have locks of their own, taken inside it.
  std::vector<std::unique_ptr<SlotPool>> pools_;

  // Of the call's own thread, with room for the most experts of a layer: a call that is abandoned
  // for want of memory takes none.
  std::vector<ExpertKey> abandoned_;
  std::vector<Landing> dropped_;

  mutable Mutex mu_;
  CondVar ended_;
  std::uint64_t epoch_ GUARDED_BY(mu_) = 0;
  std::vector<std::vector<std::int32_t>> slot_of_ GUARDED_BY(mu_);  // [L][E], −1: none
  std::vector<Landing> landings_ GUARDED_BY(mu_);
  HintQueue hints_ GUARDED_BY(mu_);
  HintTrust trust_ GUARDED_BY(mu_);
  std::int32_t loads_in_flight_ GUARDED_BY(mu_) = 0;
  std::int32_t hints_in_flight_ GUARDED_BY(mu_) = 0;  // loads that nobody has asked for
  std::int32_t unplaced_ GUARDED_BY(mu_) = 0;         // misses of the running call without a slot
  bool paused_ GUARDED_BY(mu_) = false;               // no guess starts: draining or closed
  std::exception_ptr broken_ GUARDED_BY(mu_);         // what failed on another thread

  std::int64_t call_ GUARDED_BY(mu_) = 0;
  std::int64_t step_ GUARDED_BY(mu_) = 0;
  LayerIdx layer_ GUARDED_BY(mu_){-1};
  std::int32_t call_waves_ GUARDED_BY(mu_) = 0;
  std::int64_t waves_at_decode_ GUARDED_BY(mu_) = 0;
  std::int64_t scorers_lost_ GUARDED_BY(mu_) = 0;
  Nanos first_demand_ GUARDED_BY(mu_) = 0;  // of the running call; 0: none
  Nanos last_landing_ GUARDED_BY(mu_) = 0;
  Nanos last_end_ GUARDED_BY(mu_) = 0;   // of any load that brought its expert
  Nanos load_time_ GUARDED_BY(mu_) = 0;  // what the link takes for one, smoothed
  EngineStats stats_ GUARDED_BY(mu_);
};

}  // namespace sluice
