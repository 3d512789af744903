#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <string_view>
#include <variant>
#include <vector>

#include "base/mutex.h"
#include "cache/slot_cache.h"
#include "device/device.h"
#include "engine/memory_plan.h"
#include "store/expert_store.h"

namespace sluice {

/// How far the host tier has come.
struct HostTierProgress {
  std::uint64_t capacity_bytes = 0;  ///< of its slots
  std::uint64_t filled_bytes = 0;    ///< slots whose expert is there now
  std::uint64_t pinned_bytes = 0;    ///< of arenas that the copy engine reads without staging
  std::uint64_t pageable_bytes = 0;  ///< of arenas that stay unpinned: refused, or beyond the cap
};

/// Experts in host memory, whole and canonical, that copies to a device start from. Slots of the
/// same sizes as the device's, with a cache and a policy of their own; inclusive: an expert in a
/// device slot may be here as well.
///
/// Memory is a few arenas of up to 1 GiB. Pages are pinned after they were filled (the readers
/// touch them in parallel, pinning would do it on one thread), arena by arena. Arenas are cut so
/// that `pinned_cap` is used to within a slot of each size class, one class after the other.
///
/// An expert that cannot be read is left to demands, which tell its error: filling goes on without
/// it, and an arena is full when nothing is left that might fill it.
///
/// A slot lives as a device's slot does: its writer, a reader thread, waits for the slot's last
/// copy before its first write (I2), a lease keeps it from being evicted, and ends when the copy is
/// enqueued and its event recorded (I4).
///
/// Thread safety: every member.
class HostTier {
 public:
  struct Options {
    std::uint64_t pinned_cap_bytes = ~std::uint64_t{0};
    bool fills = true;  ///< false: staging alone, no expert is brought without a demand
  };
  /// Errors: CapacityError when the memory is refused.
  HostTier(const MemoryPlan& plan, const ExpertStore& store, std::string_view policy,
           Device& device, Options options);
  ~HostTier();
  HostTier(const HostTier&) = delete;
  HostTier& operator=(const HostTier&) = delete;

  /// An expert that is here, kept from leaving.
  struct Source {
    SlotLease lease;
    const std::byte* data = nullptr;
    MemoryKind kind = MemoryKind::kHost;
  };
  [[nodiscard]] std::optional<Source> find(ExpertKey key);
  [[nodiscard]] bool is_loading(ExpertKey key) const;
  /// A slot that waits for its expert's bytes.
  struct Target {
    std::byte* data = nullptr;
    EventHandle last_use{};  ///< the writer waits for it, then somebody releases it
  };
  /// Gives an absent expert a slot, evicting an idle one if none is empty.
  [[nodiscard]] std::variant<Target, Refusal> begin_load(ExpertKey key) EXCLUDES(mu_);
  /// An absent expert to bring next where a slot is empty, in the order of execution; empty when
  /// there is none, or the tier does not fill. Its slot is begun.
  [[nodiscard]] std::optional<std::pair<ExpertKey, Target>> begin_fill() EXCLUDES(mu_);
  void finish_load(ExpertKey key) EXCLUDES(mu_);
  /// The slot is empty again, and `begin_fill` brings the expert no more. `last_use`: of the
  /// target, if nobody is known to have waited for it.
  void fail_load(ExpertKey key, EventHandle last_use) EXCLUDES(mu_);
  /// As if the load had never begun.
  void cancel_load(ExpertKey key, EventHandle last_use) EXCLUDES(mu_);
  /// Ends the lease. `copied`: behind the last copy from there, the tier's from now on; {}: there
  /// was none.
  void give_back(ExpertKey key, Source& source, EventHandle copied) EXCLUDES(mu_);
  void touch(const CacheEvent& event);

  /// Pins the arenas that are full by now, one at a time; may take a second for each. Returns at
  /// once while another thread is at it, which then does these, too.
  /// Errors: the device's own, the first one, after all of them.
  void pin_filled() EXCLUDES(mu_);

  [[nodiscard]] HostTierProgress progress() const EXCLUDES(mu_);
  /// Gives back every byte. No load may be in flight, no lease alive.
  void close() EXCLUDES(mu_);

 private:
  struct Arena {
    DeviceBuffer memory;
    std::int32_t first_slot = 0;
    std::int32_t num_slots = 0;
    bool may_pin = false;  // within the cap
    bool settled = false;  // pinned, or never to be
    bool pinned = false;
  };
  struct Record {
    std::byte* data = nullptr;
    std::size_t arena = 0;
    ExpertKey key{};
    bool occupied = false;  // loading or ready
    bool written = false;   // ever
    EventHandle last_use{};
  };
  struct Pool {
    std::size_t slot_bytes = 0;
    std::unique_ptr<SlotCache> cache;
    std::vector<Arena> arenas;
    std::vector<Record> records;
    std::int32_t occupied = 0;
  };

  /// Null where no expert of the layer's size needs memory.
  [[nodiscard]] Pool* pool_of(LayerIdx layer) const;
  [[nodiscard]] std::int32_t& slot_of_locked(ExpertKey key) REQUIRES(mu_);
  void add_arenas(Pool& pool, std::int32_t num_slots, bool may_pin);
  [[nodiscard]] std::variant<Target, Refusal> begin_locked(ExpertKey key) REQUIRES(mu_);
  void end_load_locked(ExpertKey key, EventHandle last_use) REQUIRES(mu_);
  [[nodiscard]] bool may_fill_locked() const REQUIRES(mu_);
  [[nodiscard]] bool is_full_locked(const Pool& pool, const Arena& arena) const REQUIRES(mu_);
  [[nodiscard]] Arena* full_arena_locked() REQUIRES(mu_);
  void settle(Arena& arena) EXCLUDES(mu_);

  Device& device_;
  const Options options_;
  const std::vector<std::int32_t> class_of_layer_;
  std::vector<std::int32_t> experts_of_layer_;

  mutable Mutex mu_;
  std::vector<std::unique_ptr<Pool>> pools_;  // arenas and records: guarded by mu_
  std::vector<std::vector<std::int32_t>> slot_of_ GUARDED_BY(mu_);  // or one of the two below
  static constexpr std::int32_t kAbsent = -1;
  static constexpr std::int32_t kUnreadable = -2;  // absent, and left to demands
  ExpertKey next_fill_ GUARDED_BY(mu_){};
  bool pinning_ GUARDED_BY(mu_) = false;
  HostTierProgress progress_ GUARDED_BY(mu_);
};

}  // namespace sluice
