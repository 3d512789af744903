#pragma once

#include <cstdint>
#include <exception>
#include <memory>

#include "base/ids.h"
#include "base/mutex.h"

namespace sluice {

/// Demands before hints for the next layer, those before hints further ahead, and last what fills a
/// tier that nobody waits for.
enum class Priority : std::uint8_t { kDemand, kNextLayer, kFurtherAhead, kFill };
[[nodiscard]] constexpr bool is_hint(Priority priority) { return priority != Priority::kDemand; }

enum class TicketState : std::uint8_t { kPending, kDone, kFailed, kCancelled };

/// One transfer. Copyable: every waiter sees the same outcome (I5, I6).
///
/// Thread safety: all members.
/// Errors: InternalError from an empty ticket.
class Ticket {
 public:
  Ticket() = default;
  [[nodiscard]] TicketState state() const;
  [[nodiscard]] bool finished() const { return state() != TicketState::kPending; }
  /// Rethrows the transfer's own error, if it failed.
  void rethrow() const;
  [[nodiscard]] explicit operator bool() const noexcept { return shared_ != nullptr; }
  bool operator==(const Ticket&) const = default;

 private:
  friend class TransferEngine;
  struct Shared;
  explicit Ticket(std::shared_ptr<Shared> shared) : shared_(std::move(shared)) {}
  std::shared_ptr<Shared> shared_;
};

}  // namespace sluice
