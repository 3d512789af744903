#pragma once

#include <cstddef>
#include <cstdint>
#include <exception>
#include <functional>

#include "base/ids.h"
#include "device/device.h"
#include "transfer/ticket.h"

namespace sluice {

/// One chunk on its way. `token` names it to the transfer engine when it lands.
struct ChunkCopy {
  std::uint64_t token = 0;
  ExpertKey key{};
  std::int32_t chunk = 0;
  std::size_t bytes = 0;
  std::byte* slot = nullptr;
  const std::byte* source = nullptr;  ///< of the whole expert; null: the link knows where it lies
  MemoryKind source_kind = MemoryKind::kHost;
  Priority priority = Priority::kDemand;
  EventHandle last_use{};  ///< the writer waits for it before its first write (I2); {}: passed
};

/// What chunks travel on: a disk's reader pool, a copy engine, a stepped device, a link model.
///
/// Thread safety: `start` is called outside of every lock, by whoever calls `step`, and may run on
/// several threads at once.
class Link {
 public:
  /// Called once per started chunk, on any thread; the error is null when the bytes are there, or,
  /// on a link that `lands_early`, when they will be there before anything that is enqueued behind
  /// them. `bytes_read`: physical bytes that the chunk cost, also when it failed.
  using Landed =
      std::function<void(std::uint64_t token, std::exception_ptr error, std::uint64_t bytes_read)>;
  /// Called once per chunk of a link that lands early and landed without an error: it no longer
  /// takes room on the link.
  using Retired = std::function<void(std::uint64_t token)>;

  virtual ~Link() = default;
  /// How many chunks may be started ahead; at most half of them (at least one) for hints.
  [[nodiscard]] virtual int depth() const = 0;
  /// Who is told of landings. Set once, before the first `start`.
  virtual void set_landed(Landed landed) = 0;
  /// A copy engine reports a chunk when it is enqueued, so that the consumer can be enqueued behind
  /// it without the host in between, and retires it when it has been copied.
  [[nodiscard]] virtual bool lands_early() const { return false; }
  virtual void set_retired(Retired /*retired*/) {}
  /// Begins one chunk. Must not block and must not call `landed` on the calling thread. An
  /// exception is the chunk's own error: it counts as landed.
  virtual void start(const ChunkCopy& copy) = 0;
  /// Memory that the link works in, beside the slots: bounce buffers.
  [[nodiscard]] virtual std::uint64_t workspace_bytes() const { return 0; }
  /// Stops threads after the chunks in flight; nothing is started afterwards. Idempotent.
  virtual void close() = 0;
};

}  // namespace sluice
