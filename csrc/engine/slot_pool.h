#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <utility>
#include <vector>

#include "base/clock.h"
#include "cache/slot_cache.h"
#include "device/device.h"
#include "transfer/ticket.h"

namespace sluice {

/// What the engine remembers of one slot beside the cache's own state.
struct SlotRecord {
  ExpertKey key{};
  bool occupied = false;  ///< loading or ready
  bool loading = false;
  bool by_hint = false;          ///< the load was a guess …
  bool asked = false;            ///< … and a call has asked for the expert since
  bool cancelled = false;        ///< loading, and told to stop
  std::int32_t waiter = -1;      ///< the running call's need that waits for the load
  std::uint64_t bytes_read = 0;  ///< of a guess that has landed and was not asked for yet

  Priority priority = Priority::kDemand;
  double probability = 0;
  Nanos deadline = kNever;
  Nanos submitted_at = 0;
  std::uint64_t shown = 0;  ///< the load's range, while it is loading

  EventHandle ready{};  ///< behind the last byte written (I3)
  /// Behind the last launch that reads it (I2); lent to a load, which gives it back if it fails.
  EventHandle last_use{};

  std::int64_t call = 0;  ///< the call that used the slot last, and in which of its waves
  std::int32_t wave = 0;
};

/// The slots of one size class: one slab, one cache, one record each.
struct SlotPool {
  SlotPool(std::size_t bytes_per_slot, std::int32_t num_slots, std::unique_ptr<Policy> policy,
           Device& device)
      : slot_bytes(bytes_per_slot),
        cache(num_slots, std::move(policy)),
        slab(device.allocate_slab(bytes_per_slot * static_cast<std::size_t>(num_slots))),
        records(static_cast<std::size_t>(num_slots)) {}

  [[nodiscard]] std::byte* address(SlotIdx slot) const {
    return slab.data() + static_cast<std::size_t>(to_int(slot)) * slot_bytes;
  }
  [[nodiscard]] SlotRecord& record(SlotIdx slot) {
    return records[static_cast<std::size_t>(to_int(slot))];
  }

  const std::size_t slot_bytes;
  SlotCache cache;
  DeviceBuffer slab;
  std::vector<SlotRecord> records;
  std::int32_t occupied = 0;
};

}  // namespace sluice
