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
/// touch them in parallel, pinning would do it on one thread), arena by arena, up to `pinned_cap`.
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
  /// `last_use`: of the target, if nobody is known to have waited for it.
  void fail_load(ExpertKey key, EventHandle last_use) EXCLUDES(mu_);
  /// Ends the lease. `copied`: behind the last copy from there, the tier's from now on; {}: there
  /// was none.
  void give_back(ExpertKey key, Source& source, EventHandle copied) EXCLUDES(mu_);
  void touch(const CacheEvent& event);

  /// Pins the arenas that have been filled since the last time, one at a time; may take a second
  /// for each. Does nothing while another thread is at it.
  void pin_filled() EXCLUDES(mu_);

  [[nodiscard]] HostTierProgress progress() const EXCLUDES(mu_);
  /// Gives back every byte. No load may be in flight, no lease alive.
  void close() EXCLUDES(mu_);

 private:
  struct Arena {
    DeviceBuffer memory;
    std::int32_t unfilled = 0;  // slots that were never written
    bool settled = false;       // pinned, or never to be
    bool pinned = false;
  };
  struct Record {
    ExpertKey key{};
    bool occupied = false;  // loading or ready
    bool written = false;   // ever
    EventHandle last_use{};
  };
  struct Pool {
    std::size_t slot_bytes = 0;
    std::int32_t slots_per_arena = 1;
    std::unique_ptr<SlotCache> cache;
    std::vector<Arena> arenas;
    std::vector<Record> records;
    std::int32_t occupied = 0;

    [[nodiscard]] Arena& arena_of(std::int32_t slot) {
      return arenas[static_cast<std::size_t>(slot / slots_per_arena)];
    }
    [[nodiscard]] std::byte* address(std::int32_t slot) {
      return arena_of(slot).memory.data() +
             static_cast<std::size_t>(slot % slots_per_arena) * slot_bytes;
    }
  };

  /// Null where no expert of the layer's size needs memory.
  [[nodiscard]] Pool* pool_of(LayerIdx layer) const;
  [[nodiscard]] std::int32_t& slot_of_locked(ExpertKey key) REQUIRES(mu_);
  [[nodiscard]] std::variant<Target, Refusal> begin_locked(ExpertKey key) REQUIRES(mu_);
  void settle(Arena& arena) EXCLUDES(mu_);

  Device& device_;
  const Options options_;
  const std::vector<std::int32_t> class_of_layer_;
  std::vector<std::int32_t> experts_of_layer_;

  mutable Mutex mu_;
  std::vector<std::unique_ptr<Pool>> pools_;  // arenas and records: guarded by mu_
  std::vector<std::vector<std::int32_t>> slot_of_ GUARDED_BY(mu_);
  ExpertKey next_fill_ GUARDED_BY(mu_){};
  bool pinning_ GUARDED_BY(mu_) = false;
  HostTierProgress progress_ GUARDED_BY(mu_);
};

}  // namespace sluice
