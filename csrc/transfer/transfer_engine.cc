#include "transfer/transfer_engine.h"

#include <algorithm>
#include <string>
#include <utility>

#include "base/error.h"
#include "transfer/transfer_engine_impl.h"

namespace sluice {

TransferEngine::TransferEngine(const ChunkSource& source, Link& link, Finished finished)
    : impl_(std::make_unique<Impl>(source, link, std::move(finished))) {}

TransferEngine::~TransferEngine() {
  MutexLock lock(impl_->mu);
  for (Impl::Request* const request : impl_->queue)
    request->ticket->state.store(TicketState::kCancelled, std::memory_order_release);
}

void TransferEngine::reserve(std::int32_t loads) {
  Impl& impl = *impl_;
  MutexLock lock(impl.mu);
  const auto count = static_cast<std::size_t>(std::max(0, loads));
  impl.unused.reserve(count);
  impl.queue.reserve(count);
  impl.requests.reserve(count);
  while (impl.requests.size() < count) {
    impl.requests.push_back(std::make_unique<Impl::Request>());
    impl.unused.push_back(impl.requests.back().get());
  }
  // Pools keep what was given back.
  std::vector<std::shared_ptr<Ticket::Shared>> tickets;
  for (std::int32_t i = 0; i < loads; ++i) {
    tickets.push_back(
        std::allocate_shared<Ticket::Shared>(TicketAllocator<Ticket::Shared>(impl.tickets)));
    impl.by_key.try_emplace(make_key(-1, i), nullptr);
  }
  for (std::int32_t i = 0; i < loads; ++i) impl.by_key.erase(make_key(-1, i));
}

Ticket TransferEngine::submit(const LoadRequest& request) {
  Impl& impl = *impl_;
  MutexLock lock(impl.mu);
#if !defined(SLUICE_PLANT_I5)
  if (const auto found = impl.by_key.find(request.key); found != impl.by_key.end()) {
    Impl::Request& known = *found->second;
    const bool begins_anew =
        known.ending && *known.ending != TicketState::kDone && request.slot != nullptr;
    if (!begins_anew) {
      if (!known.ending)
        Impl::raise(known, request.priority, request.probability, request.deadline);
      return Ticket(known.ticket);
    }
  }
#endif
  const std::int32_t num_chunks = impl.source.num_chunks(request.key);
  require<InternalError>(request.slot != nullptr && num_chunks > 0, [&] {
    return "submit: got " + describe(request.key) + " of " + std::to_string(num_chunks) +
           " chunks " + (request.slot == nullptr ? "without a slot" : "with a slot") +
           ", expected at least one chunk and a slot for what is not in flight";
  });
  auto ticket = std::allocate_shared<Ticket::Shared>(TicketAllocator<Ticket::Shared>(impl.tickets));
  Impl::Request& known = impl.take_request_locked();
  try {
    impl.by_key.insert_or_assign(request.key, &known);
  } catch (...) {
    impl.unused.push_back(&known);  // it has just left: there is room
    throw;
  }
  known.load = request;
  known.load.probability = Impl::rank_of(request.priority, request.probability);
  known.ticket = ticket;
  known.arrival = ++impl.last_arrival;
  known.num_chunks = num_chunks;
  impl.queue.push_back(&known);  // room was reserved with the request
  return Ticket(std::move(ticket));
}

std::optional<Ticket> TransferEngine::find(ExpertKey key) const {
  MutexLock lock(impl_->mu);
  const auto found = impl_->by_key.find(key);
  if (found == impl_->by_key.end()) return std::nullopt;
  return Ticket(found->second->ticket);
}

void TransferEngine::promote(ExpertKey key, Priority priority) {
  MutexLock lock(impl_->mu);
  const auto found = impl_->by_key.find(key);
  if (found == impl_->by_key.end() || found->second->ending) return;
  const LoadRequest& load = found->second->load;
  Impl::raise(*found->second, priority, load.probability, load.deadline);
}

bool TransferEngine::cancel(ExpertKey key, bool even_demand) {
  Impl& impl = *impl_;
  Impl::Request* request = nullptr;
  {
    MutexLock lock(impl.mu);
    const auto found = impl.by_key.find(key);
    if (found == impl.by_key.end() || found->second->ending) return false;
    if (!even_demand && !is_hint(found->second->load.priority)) return false;
    if (Impl::cancel_locked(*found->second)) request = found->second;
  }
  if (request != nullptr) impl.end(*request);
  return true;
}

void TransferEngine::cancel_all() {
  Impl& impl = *impl_;
  for (;;) {
    Impl::Request* ended = nullptr;
    {
      MutexLock lock(impl.mu);
      for (Impl::Request* const request : impl.queue) {
        if (request->ending || !Impl::cancel_locked(*request)) continue;
        ended = request;
        break;
      }
    }
    if (ended == nullptr) return;
    impl.end(*ended);
  }
}

Nanos TransferEngine::step(Nanos now) {
  Impl& impl = *impl_;
  for (;;) {
    Impl::Request* expired = nullptr;
    std::optional<ChunkCopy> copy;
    {
      MutexLock lock(impl.mu);
      expired = impl.expired_locked(now);
      if (expired == nullptr) copy = impl.take_chunk_locked();
      if (expired == nullptr && !copy) return impl.next_deadline_locked();
    }
    if (expired != nullptr) {
      impl.end(*expired);
      continue;
    }
    try {
      impl.link.start(*copy);
    } catch (...) {
      landed(copy->token, std::current_exception(), 0);
    }
  }
}

void TransferEngine::landed(std::uint64_t token, std::exception_ptr error,
                            std::uint64_t bytes_read) {
  Impl& impl = *impl_;
  Impl::Request* request = nullptr;
  bool ends = false;
  {
    MutexLock lock(impl.mu);
    const std::size_t num_in_flight = impl.in_flight.size();
    const auto chunk = std::find_if(
        impl.in_flight.begin(), impl.in_flight.end(),
        [&](const Impl::InFlight& each) { return each.token == token && each.request != nullptr; });
    require<InternalError>(chunk != impl.in_flight.end(), [&] {
      return "landed: got token " + std::to_string(token) + ", expected one of the " +
             std::to_string(num_in_flight) + " chunks in flight";
    });
    request = chunk->request;
    if (impl.link.lands_early() && !error) {
      chunk->hint = is_hint(request->load.priority);
      chunk->request = nullptr;
    } else {
      impl.in_flight.erase(chunk);
    }
    --request->in_flight;
    request->bytes_read += bytes_read;
    if (error && !request->error) request->error = std::move(error);
    request->ending = Impl::outcome(*request);
    ends = request->ending.has_value();
  }
  if (ends) impl.end(*request);  // if not, it belongs to other threads by now
}

void TransferEngine::retired(std::uint64_t token) {
  Impl& impl = *impl_;
  MutexLock lock(impl.mu);
  const auto chunk = std::find_if(
      impl.in_flight.begin(), impl.in_flight.end(),
      [&](const Impl::InFlight& each) { return each.token == token && each.request == nullptr; });
  require<InternalError>(chunk != impl.in_flight.end(), [&] {
    return "retired: got token " + std::to_string(token) +
           ", expected one of a chunk that has landed and not retired";
  });
  impl.in_flight.erase(chunk);
}

TransferEngine::Depth TransferEngine::depth() const {
  MutexLock lock(impl_->mu);
  Depth depth;
  for (const Impl::Request* const request : impl_->queue)
    if (request->may_start()) ++depth.queued;
  depth.in_flight = static_cast<std::int32_t>(impl_->in_flight.size());
  depth.hints_in_flight = impl_->hints_in_flight_locked();
  return depth;
}

bool TransferEngine::idle() const {
  MutexLock lock(impl_->mu);
  return impl_->queue.empty();
}

}  // namespace sluice
