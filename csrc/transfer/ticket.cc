#include "transfer/ticket.h"

#include <string>

#include "base/error.h"
#include "transfer/ticket_shared.h"

namespace sluice {
namespace {

template <class Shared>
const Shared& not_empty(const std::shared_ptr<Shared>& shared) {
  require<InternalError>(shared != nullptr, [] {
    return std::string("ticket: got an empty one, expected one from submit or find");
  });
  return *shared;
}

}  // namespace

TicketState Ticket::state() const {
  return not_empty(shared_).state.load(std::memory_order_acquire);
}

void Ticket::rethrow() const {
  if (state() == TicketState::kFailed) std::rethrow_exception(shared_->error);
}

}  // namespace sluice
