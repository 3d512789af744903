#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>

#include "device/device.h"
#include "transfer/link.h"
#include "transfer/transfer_engine.h"

namespace sluice {

/// Whole slots cut into chunks of one size: what the copy engine is given at once. No more than the
/// engine holds ahead delays a demand; of a chunk below 1 MiB the latency takes a tenth of a PCIe 5
/// link's rate or more.
class SlotChunks final : public ChunkSource {
 public:
  SlotChunks(std::function<std::size_t(ExpertKey)> slot_bytes, std::size_t chunk_bytes)
      : slot_bytes_(std::move(slot_bytes)), chunk_bytes_(chunk_bytes) {}
  [[nodiscard]] std::int32_t num_chunks(ExpertKey key) const override;
  [[nodiscard]] std::size_t chunk_bytes(ExpertKey key, std::int32_t chunk) const override;
  [[nodiscard]] std::size_t size() const noexcept { return chunk_bytes_; }

 private:
  const std::function<std::size_t(ExpertKey)> slot_bytes_;
  const std::size_t chunk_bytes_;
};

/// What a copy engine has done. Exact, monotonic.
struct CopyCounters {
  std::uint64_t bytes = 0;
  std::uint64_t pageable_bytes = 0;  ///< of these, through staging: the counted degradation
};

/// A copy engine as a link: one thread enqueues chunks on the device's copy stream, at most two
/// ahead, and retires them when they have been copied. A chunk lands when it is enqueued.
///
/// Chunks whose source is not pinned go through two pinned buffers of one chunk each.
class CopyLink : public Link {
 public:
  [[nodiscard]] virtual CopyCounters counters() const = 0;
};
/// `broken`: told of what fails on the link's thread beside a chunk (a device that is gone).
/// The first chunk that is not pinned takes the staging buffers: CapacityError, when they are
/// refused, is that chunk's.
[[nodiscard]] std::unique_ptr<CopyLink> make_copy_link(
    Device& device, std::size_t chunk_bytes, std::function<void(std::exception_ptr)> broken);

}  // namespace sluice
