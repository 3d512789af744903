#pragma once

#include <algorithm>
#include <memory>
#include <memory_resource>
#include <unordered_map>
#include <utility>
#include <vector>

#include "base/mutex.h"
#include "transfer/ticket_shared.h"
#include "transfer/transfer_engine.h"

namespace sluice {

/// The requests of a transfer engine: which chunk is next, and how each of them ends.
///
/// A request is kept by pointer from `submit` until its ticket resolves. `ending` is set once,
/// under the lock, by whoever then runs the callback; a request that is ending is touched by nobody
/// else.
struct TransferEngine::Impl {
  /// Orders hints; a demand counts fully, and what is not a number counts nothing.
  static double rank_of(Priority priority, double probability) {
    if (!is_hint(priority)) return 1.0;
    return probability >= 0 ? probability : 0.0;
  }

  struct Request {
    LoadRequest load;
    std::shared_ptr<Ticket::Shared> ticket;
    std::uint64_t arrival = 0;
    std::int32_t num_chunks = 0;
    std::int32_t next_chunk = 0;  // those before it were started
    std::int32_t in_flight = 0;
    std::uint64_t bytes_read = 0;
    bool cancelling = false;
    std::exception_ptr error;  // of the first chunk that failed
    std::optional<TicketState> ending;

    [[nodiscard]] bool may_start() const {
      return !ending && !cancelling && !error && next_chunk < num_chunks;
    }
    /// A hint that has not started; once it has, or once somebody demands it, time is no reason.
    [[nodiscard]] bool may_expire() const {
#if !defined(SLUICE_PLANT_LAW4)
      if (!is_hint(load.priority)) return false;
#endif
      return may_start() && next_chunk == 0;
    }
    [[nodiscard]] bool precedes(const Request& other) const {
      if (load.priority != other.load.priority) return load.priority < other.load.priority;
      if (load.probability != other.load.probability)
        return load.probability > other.load.probability;
      return arrival < other.arrival;
    }
  };
  struct InFlight {
    std::uint64_t token;
    Request* request;  // null: has landed early, and still takes room on the link
    bool hint;         // when it landed
    [[nodiscard]] bool is_hint_now() const {
      return request == nullptr ? hint : is_hint(request->load.priority);
    }
  };

  Impl(const ChunkSource& chunk_source, Link& the_link, Finished on_finished)
      : source(chunk_source), link(the_link), finished(std::move(on_finished)), by_key(&nodes) {
    // Chunks start on readers' threads, where a refused allocation has nobody to go to.
    in_flight.reserve(static_cast<std::size_t>(std::max(1, link.depth())));
  }

  Request& take_request_locked() REQUIRES(mu) {
    if (unused.empty()) {
      requests.push_back(std::make_unique<Request>());
      unused.reserve(requests.capacity());
      queue.reserve(requests.capacity());
      unused.push_back(requests.back().get());
    }
    Request& request = *unused.back();
    unused.pop_back();
    return request;
  }

  static void raise(Request& request, Priority priority, double probability, Nanos deadline) {
    LoadRequest& load = request.load;
    const double rank = rank_of(priority, probability);
    if (priority < load.priority) {
      load.probability = rank;
    } else if (priority == load.priority) {
      load.probability = std::max(load.probability, rank);
    }
    load.priority = std::min(load.priority, priority);
    load.deadline = std::max(load.deadline, deadline);
    request.cancelling = false;
  }

  [[nodiscard]] std::int32_t hints_in_flight_locked() const REQUIRES(mu) {
    return static_cast<std::int32_t>(
        std::count_if(in_flight.begin(), in_flight.end(),
                      [](const InFlight& chunk) { return chunk.is_hint_now(); }));
  }

  Request* expired_locked(Nanos now) REQUIRES(mu) {
    for (Request* const request : queue) {
      if (request->may_expire() && request->load.deadline <= now) {
        request->ending = TicketState::kCancelled;
        return request;
      }
    }
    return nullptr;
  }

  [[nodiscard]] Nanos next_deadline_locked() const REQUIRES(mu) {
    Nanos next = kNever;
    for (const Request* const request : queue)
      if (request->may_expire()) next = std::min(next, request->load.deadline);
    return next;
  }

  /// The best request's next chunk, if the link has room for it.
  std::optional<ChunkCopy> take_chunk_locked() REQUIRES(mu) {
    const int depth = std::max(1, link.depth());
    if (std::cmp_greater_equal(in_flight.size(), depth)) return std::nullopt;
#if defined(SLUICE_PLANT_LAW4_DEPTH)
    const int hint_depth = depth;
#else
    const int hint_depth = std::max(1, depth / 2);
#endif
    Request* best = nullptr;
    for (Request* const request : queue)
      if (request->may_start() && (best == nullptr || request->precedes(*best))) best = request;
    if (best == nullptr) return std::nullopt;
    if (is_hint(best->load.priority) && hints_in_flight_locked() >= hint_depth) return std::nullopt;
    const std::int32_t chunk = best->next_chunk;
    const std::size_t bytes = source.chunk_bytes(best->load.key, chunk);
    in_flight.push_back({.token = ++last_token, .request = best, .hint = false});
    ++best->next_chunk;
    ++best->in_flight;
    return ChunkCopy{.token = last_token,
                     .key = best->load.key,
                     .chunk = chunk,
                     .bytes = bytes,
                     .slot = best->load.slot,
                     .source = best->load.source,
                     .source_kind = best->load.source_kind,
                     .priority = best->load.priority,
                     .last_use = best->load.last_use};
  }

  /// How a request that has just lost its last chunk in flight ends, if it does.
  static std::optional<TicketState> outcome(const Request& request) {
    if (request.in_flight > 0) return std::nullopt;
    if (request.error) return TicketState::kFailed;
    if (request.cancelling) return TicketState::kCancelled;
    if (request.next_chunk == request.num_chunks) return TicketState::kDone;
    return std::nullopt;
  }

  /// Stops a request from starting chunks. True if it ends now: call `end`.
  static bool cancel_locked(Request& request) {
    request.cancelling = true;
    request.ending = outcome(request);
    return request.ending.has_value();
  }

  /// Reports a request whose `ending` this thread has set, then resolves its ticket.
  void end(Request& request) EXCLUDES(mu) {
    TicketState state = *request.ending;
    std::exception_ptr error = std::move(request.error);
    try {
      finished(request.load, state, error, request.bytes_read);
    } catch (...) {
      state = TicketState::kFailed;
      error = std::current_exception();
    }
    std::shared_ptr<Ticket::Shared> ticket;
    {
      MutexLock lock(mu);
      // Gone from the table and resolved at once: a later asker gets a new load, an earlier one
      // this.
      const auto found = by_key.find(request.load.key);
      if (found != by_key.end() && found->second == &request) by_key.erase(found);
      queue.erase(std::find(queue.begin(), queue.end(), &request));
      ticket = std::move(request.ticket);
#if !defined(SLUICE_PLANT_I6)
      ticket->error = std::move(error);
      ticket->state.store(state, std::memory_order_release);
#else
      ticket->state.store(state == TicketState::kFailed ? TicketState::kDone : state);
#endif
      request = {};
      unused.push_back(&request);
    }
  }

  const ChunkSource& source;
  Link& link;
  const Finished finished;
  const std::shared_ptr<TicketMemory> tickets = std::make_shared<TicketMemory>();

  mutable Mutex mu;
  std::vector<std::unique_ptr<Request>> requests GUARDED_BY(mu);  // all that were ever needed
  std::vector<Request*> unused GUARDED_BY(mu);
  std::vector<Request*> queue GUARDED_BY(mu);  // all that have not resolved, by arrival
  std::vector<InFlight> in_flight GUARDED_BY(mu);
  std::pmr::unsynchronized_pool_resource nodes GUARDED_BY(mu);
  std::pmr::unordered_map<ExpertKey, Request*> by_key GUARDED_BY(mu);
  std::uint64_t last_token GUARDED_BY(mu) = 0;
  std::uint64_t last_arrival GUARDED_BY(mu) = 0;
};

}  // namespace sluice
