#pragma once

#include <cstdint>
#include <exception>
#include <functional>
#include <memory>

#include "base/clock.h"
#include "transfer/transfer_engine.h"

namespace sluice {

/// How experts come into slots, over one link or several: from a disk straight into RAM, or from
/// the disk into the host tier and from there to an accelerator.
///
/// What a transfer engine promises holds for a path: at most one load per expert is in flight (I5),
/// it ends once, and how it ends is reported before anybody can ask for the expert anew.
///
/// Thread safety: every member. `submit`, `promote`, `in_flight` report nothing; `cancel`,
/// `cancel_all` and `step` may end loads on the calling thread, so no lock that the callbacks take
/// may be held.
class TransferPath {
 public:
  using Finished = TransferEngine::Finished;
  /// What failed on a thread that nobody waits for.
  using Broken = std::function<void(std::exception_ptr error)>;

  virtual ~TransferPath() = default;
  /// Who is told. Set once, before the first `submit`.
  virtual void connect(Finished finished, Broken broken) = 0;
  /// Takes the memory of `loads` at once now.
  virtual void reserve(std::int32_t loads) = 0;

  /// Queues a load of an expert that is not in flight; starts nothing: call `step`.
  virtual void submit(const LoadRequest& request) = 0;
  [[nodiscard]] virtual bool in_flight(ExpertKey key) const = 0;
  /// As TransferEngine::promote, cancel and cancel_all.
  virtual void promote(ExpertKey key, Priority priority) = 0;
  virtual bool cancel(ExpertKey key, bool even_demand = false) = 0;
  virtual void cancel_all() = 0;
  /// Starts what there is room for. Returns when it wants to be called again if nothing lands.
  virtual Nanos step() = 0;

  /// How many guesses may be on their way at once: half of what the last link takes ahead.
  [[nodiscard]] virtual std::int32_t hint_room() const = 0;
  /// Memory that the links work in, beside slots and host tier.
  [[nodiscard]] virtual std::uint64_t workspace_bytes() const = 0;
  /// Joins threads after the chunks in flight; nothing is started afterwards. Idempotent.
  virtual void close() = 0;
};

/// One link, from the store into the slots.
[[nodiscard]] std::unique_ptr<TransferPath> make_direct_path(
    std::shared_ptr<const ExpertStore> store, std::unique_ptr<Link> link, const Clock& clock);

}  // namespace sluice
