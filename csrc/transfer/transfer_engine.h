#pragma once

#include <cstddef>
#include <cstdint>
#include <exception>
#include <functional>
#include <memory>
#include <optional>

#include "base/clock.h"
#include "base/ids.h"
#include "transfer/link.h"
#include "transfer/ticket.h"

namespace sluice {

/// One expert to bring into one slot.
struct LoadRequest {
  ExpertKey key{};
  std::byte* slot = nullptr;  ///< null in `submit`: ask for what is in flight, begin nothing
  const std::byte* source = nullptr;  ///< handed to the link; null: it knows where the expert lies
  MemoryKind source_kind = MemoryKind::kHost;
  Priority priority = Priority::kDemand;
  double probability = 1.0;  ///< orders hints of one priority
  Nanos deadline = kNever;   ///< a hint that has not started by then is dropped
  EventHandle last_use{};    ///< of the slot's last reader; handed to the link with each chunk (I2)
};

/// How many chunks an expert has, and their sizes. The store, or a test.
class ChunkSource {
 public:
  virtual ~ChunkSource() = default;
  [[nodiscard]] virtual std::int32_t num_chunks(ExpertKey key) const = 0;
  [[nodiscard]] virtual std::size_t chunk_bytes(ExpertKey key, std::int32_t chunk) const = 0;
};

/// Order, progress and cancelling of copies: a state machine without a clock and without a thread.
///
/// `submit`, `promote` and `cancel` change the queue; `step(now)` starts chunks while the link has
/// room, best request first (demand, then nearer layers, then probability, then arrival); the link
/// reports landings through `landed`, which also wants a `step` after it. A request's chunks start
/// in order, so what is left of a cancelled one is known and a later asker can revive it.
///
/// When a request ends (done, failed, cancelled) the `Finished` callback runs once, outside the
/// engine's lock, before its ticket is resolved: the cache's slot is ready, or empty, before any
/// waiter wakes. Until the callback has returned the key is still in flight, so a late asker
/// shares the ticket (I5). Only one that brings a slot of its own while a failed or cancelled
/// request is being reported (the cache's slot was empty again) begins anew: its predecessor has no
/// chunk in flight any more. A callback that throws fails the ticket with that exception.
///
/// Tickets resolve inside `landed`, `step`, `cancel` and `cancel_all`, after the callback: a driver
/// wakes its waiters when these return, not from the callback. A demand that shares the ticket of a
/// cancelled hint too late to revive it sees kCancelled and asks again.
///
/// Thread safety: every member may be called from any thread. Destroyed after its link is closed;
/// tickets left over end kCancelled.
class TransferEngine {
 public:
  /// `error` is null for kDone and kCancelled; `bytes_read` is the sum over the chunks that landed.
  using Finished = std::function<void(const LoadRequest& request, TicketState state,
                                      std::exception_ptr error, std::uint64_t bytes_read)>;

  TransferEngine(const ChunkSource& source, Link& link, Finished finished);
  ~TransferEngine();
  TransferEngine(const TransferEngine&) = delete;
  TransferEngine& operator=(const TransferEngine&) = delete;

  /// Takes the memory of `loads` at once now: up to so many, the members below need none.
  void reserve(std::int32_t loads);
  /// Queues a load; a key already in flight gives its ticket, raised to the better priority and
  /// revived if it was being cancelled (the slot stays the one it has). Starts nothing: call
  /// `step`. Errors: InternalError when a key that is not in flight comes without a slot or chunks.
  [[nodiscard]] Ticket submit(const LoadRequest& request);
  /// The ticket of a key in flight, if any.
  [[nodiscard]] std::optional<Ticket> find(ExpertKey key) const;
  /// Raises a hint to `priority` and revives it if it was being cancelled; no other effect on one
  /// that is better already, none on one that has ended.
  void promote(ExpertKey key, Priority priority);
  /// Drops what has not started. True if the key was in flight as a hint; demands are not
  /// cancelled (law 4) unless `even_demand` (the session closes, a call was abandoned). The ticket
  /// ends kCancelled at once if no chunk is in flight, else when the last of them lands.
  bool cancel(ExpertKey key, bool even_demand = false);
  /// Cancels everything; demands too.
  void cancel_all();

  /// Starts chunks while the link has room and drops hints whose deadline has passed. Returns when
  /// it wants to be called again if nothing lands before: the next deadline, or kNever.
  Nanos step(Nanos now);
  /// The link's report. Errors: InternalError on a token that is not in flight.
  void landed(std::uint64_t token, std::exception_ptr error, std::uint64_t bytes_read);
  /// The report, of a link that lands early, that a chunk has left it; wants a `step` after it.
  /// Errors: InternalError on a token that has not landed, or has retired.
  void retired(std::uint64_t token);

  struct Depth {
    std::int32_t queued = 0;     ///< requests with chunks not yet started
    std::int32_t in_flight = 0;  ///< chunks started and not landed (link that lands early: retired)
    std::int32_t hints_in_flight = 0;
  };
  [[nodiscard]] Depth depth() const;
  [[nodiscard]] bool idle() const;

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace sluice
