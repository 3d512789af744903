#pragma once

#include <cstdint>
#include <memory>
#include <memory_resource>
#include <optional>
#include <unordered_map>
#include <variant>
#include <vector>

#include "base/ids.h"
#include "base/mutex.h"
#include "cache/policy.h"

namespace sluice {

class SlotCache;

/// Keeps one expert resident while it is alive (I4). Move-only; returns itself.
class SlotLease {
 public:
  SlotLease() = default;
  SlotLease(SlotLease&& other) noexcept;
  SlotLease& operator=(SlotLease&& other) noexcept;
  ~SlotLease();

  [[nodiscard]] SlotIdx slot() const noexcept { return slot_; }
  [[nodiscard]] explicit operator bool() const noexcept { return cache_ != nullptr; }
  /// Ends the lease now.
  void reset() noexcept;

 private:
  friend class SlotCache;
  SlotLease(SlotCache* cache, SlotIdx slot) : cache_(cache), slot_(slot) {}
  SlotCache* cache_ = nullptr;
  SlotIdx slot_{};
};

/// kEmpty → kLoading → kReady → kEmpty; nothing else moves a slot.
enum class SlotState : std::uint8_t { kEmpty, kLoading, kReady };

/// Why a load was not begun.
enum class Refusal : std::uint8_t {
  kResident,  ///< the expert is ready already
  kLoading,   ///< the expert is on its way: share its ticket (I5)
  kLeased,    ///< every slot is leased or loading
  kDeferred,  ///< the policy keeps every slot for now: the hint waits
  kDeclined,  ///< the policy does not admit a hint at this price
};

/// Maps experts to the equally sized slots of one size class.
///
/// Holds no memory and starts no copies: it decides which slot an expert gets, and the transfer
/// engine fills it. Only `begin_load`, `finish_load`, `fail_load` and eviction (inside
/// `begin_load`, or `evict_all`) move a slot. A leased or loading slot is never a victim; the
/// engine leases all residents that its wave needs before it begins a load, which is I7.
///
/// Thread safety: every public member may be called from any thread.
class SlotCache {
 public:
  SlotCache(std::int32_t num_slots, std::unique_ptr<Policy> policy);
  ~SlotCache();
  SlotCache(const SlotCache&) = delete;
  SlotCache& operator=(const SlotCache&) = delete;

  /// A lease if the expert is ready, else empty.
  [[nodiscard]] std::optional<SlotLease> find(ExpertKey key) EXCLUDES(mu_);
  [[nodiscard]] SlotState state(ExpertKey key) const EXCLUDES(mu_);

  enum class Purpose : std::uint8_t { kDemand, kHint };
  /// Gives `key` a slot in kLoading, evicting an idle expert if none is empty. A hint may be
  /// declined by the policy. `pinned_to`: only this slot may be used (the streaming ring).
  [[nodiscard]] std::variant<SlotIdx, Refusal> begin_load(ExpertKey key, Purpose purpose,
                                                          std::optional<SlotIdx> pinned_to = {})
      EXCLUDES(mu_);
  /// kLoading → kReady. Errors: InternalError when `key` is not loading.
  void finish_load(ExpertKey key) EXCLUDES(mu_);
  /// kLoading → kEmpty, after a failed or cancelled load (I6).
  void fail_load(ExpertKey key) EXCLUDES(mu_);

  /// Tells the policy what an event asked for: all of it at once, in ascending expert order, before
  /// the event's own loads begin.
  void touch(const CacheEvent& event) EXCLUDES(mu_);

  /// Tells the policy what a predictor expects.
  void publish(const ForecastRows& rows) EXCLUDES(mu_);

  /// Evicts as the policy chooses, idle experts alone, until at most `num_kept` slots are taken.
  /// Returns how many left. Replay serves misses beside the cache and decides then who stays.
  std::int32_t trim(std::int32_t num_kept) EXCLUDES(mu_);
  /// Empties every ready slot that is not leased; returns how many.
  std::int32_t evict_all() EXCLUDES(mu_);

  [[nodiscard]] std::int32_t num_slots() const noexcept { return num_slots_; }
  [[nodiscard]] std::int32_t num_leases() const EXCLUDES(mu_);
  struct SlotView {
    SlotState state = SlotState::kEmpty;
    ExpertKey key{};
    std::int32_t leases = 0;
  };
  /// A copy of all slots, for the residency map and for tests.
  [[nodiscard]] std::vector<SlotView> snapshot() const EXCLUDES(mu_);

 private:
  friend class SlotLease;
  void release(SlotIdx slot) noexcept EXCLUDES(mu_);

  [[nodiscard]] SlotView& slot_locked(SlotIdx slot) REQUIRES(mu_);
  /// The slot of an expert that must be loading, for `verb`'s message if it is not.
  [[nodiscard]] SlotIdx loading_slot_locked(ExpertKey key, const char* verb) REQUIRES(mu_);
  [[nodiscard]] std::variant<SlotIdx, Refusal> choose_slot_locked(ExpertKey key, Purpose purpose,
                                                                  std::optional<SlotIdx> pinned_to)
      REQUIRES(mu_);
  /// Adds the slot to the choice if it may be evicted.
  void consider_locked(SlotIdx slot) REQUIRES(mu_);
  /// The policy's choice among the candidates, of which there is one at least.
  [[nodiscard]] Candidate choose_victim_locked() REQUIRES(mu_);
  void evict_locked(SlotIdx slot) REQUIRES(mu_);

  std::int32_t num_slots_;
  mutable Mutex mu_;
  std::unique_ptr<Policy> policy_ GUARDED_BY(mu_);
  std::vector<SlotView> slots_ GUARDED_BY(mu_);
  // Nodes of evicted experts serve their successors: no allocation after construction.
  std::pmr::unsynchronized_pool_resource nodes_ GUARDED_BY(mu_);
  std::pmr::unordered_map<ExpertKey, SlotIdx> slot_of_ GUARDED_BY(mu_);
  std::vector<Candidate> candidates_ GUARDED_BY(mu_);  // scratch of one choice
  std::int32_t num_leases_ GUARDED_BY(mu_) = 0;
};

}  // namespace sluice
