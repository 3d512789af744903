#include "transfer/transfer_engine.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <array>
#include <cmath>
#include <functional>
#include <map>
#include <string>
#include <utility>
#include <vector>

#include "base/error.h"
#include "support/stepped_device.h"
#include "support/stepped_link.h"

namespace sluice {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;
using testing::SteppedDevice;
using testing::SteppedLink;

constexpr std::size_t kChunkBytes = 100;

ExpertKey key(std::int32_t expert) { return make_key(0, expert); }

/// Every expert has the same number of chunks, of 100, 101, 102 … bytes; some may have their own.
class Chunks final : public ChunkSource {
 public:
  explicit Chunks(std::int32_t usual) : usual_(usual) {}
  void set(ExpertKey expert, std::int32_t count) { counts_[expert] = count; }
  [[nodiscard]] std::int32_t num_chunks(ExpertKey expert) const override {
    const auto found = counts_.find(expert);
    return found == counts_.end() ? usual_ : found->second;
  }
  [[nodiscard]] std::size_t chunk_bytes(ExpertKey, std::int32_t chunk) const override {
    return kChunkBytes + static_cast<std::size_t>(chunk);
  }

 private:
  std::int32_t usual_;
  std::map<ExpertKey, std::int32_t> counts_;
};

struct Report {
  ExpertKey key;
  TicketState state;
  std::uint64_t bytes_read;
  bool operator==(const Report&) const = default;
};

/// A transfer engine over a stepped link, at a time that stands still unless it is set.
struct Rig {
  explicit Rig(int depth, std::int32_t num_chunks = 2, Device* device = nullptr)
      : chunks(num_chunks),
        link(depth, {}, device),
        transfers(chunks, link,
                  [this](const LoadRequest& request, TicketState state, std::exception_ptr error,
                         std::uint64_t bytes_read) {
                    EXPECT_EQ(error != nullptr, state == TicketState::kFailed);
                    reports.push_back({request.key, state, bytes_read});
                    if (on_finished) on_finished(request, state);
                  }) {
    link.set_landed([this](std::uint64_t token, std::exception_ptr error, std::uint64_t bytes) {
      transfers.landed(token, std::move(error), bytes);
    });
  }

  Ticket ask(std::int32_t expert, Priority priority = Priority::kDemand, double probability = 1.0,
             Nanos deadline = kNever) {
    return transfers.submit({.key = key(expert),
                             .slot = &slots[static_cast<std::size_t>(expert)],
                             .priority = priority,
                             .probability = probability,
                             .deadline = deadline});
  }
  Ticket hint(std::int32_t expert, double probability = 0.5, Nanos deadline = kNever) {
    return ask(expert, Priority::kNextLayer, probability, deadline);
  }
  void step() { (void)transfers.step(now); }
  /// Steps and lands, oldest chunk first, until nothing moves.
  void run() {
    for (step(); link.land(); step()) {
    }
  }
  /// The experts whose chunks were started, in order.
  [[nodiscard]] std::vector<int> started() const {
    std::vector<int> experts;
    for (const ChunkCopy& copy : link.history()) experts.push_back(to_int(copy.key.expert));
    return experts;
  }

  Nanos now = 1000;
  Chunks chunks;
  SteppedLink link;
  std::vector<Report> reports;
  std::function<void(const LoadRequest&, TicketState)> on_finished;
  std::array<std::byte, 64> slots{};
  TransferEngine transfers;
};

TEST(TransferEngine, ALoadStartsItsChunksInOrderAndIsDoneWhenAllHaveLanded) {
  Rig rig(4, 3);
  const Ticket ticket = rig.ask(7);
  EXPECT_TRUE(rig.link.history().empty()) << "submit starts nothing";
  rig.step();
  const std::vector<ChunkCopy> waiting = rig.link.waiting();
  ASSERT_EQ(waiting.size(), 3U);
  for (std::size_t i = 0; i < 3; ++i) {
    EXPECT_EQ(waiting[i].chunk, static_cast<std::int32_t>(i));
    EXPECT_EQ(waiting[i].bytes, kChunkBytes + i);
    EXPECT_EQ(waiting[i].slot, &rig.slots[7]);
  }
  EXPECT_TRUE(rig.link.land(2));
  EXPECT_TRUE(rig.link.land(0));
  EXPECT_FALSE(ticket.finished());
  EXPECT_TRUE(rig.link.land(0));
  EXPECT_EQ(ticket.state(), TicketState::kDone);
  EXPECT_NO_THROW(ticket.rethrow());
  EXPECT_THAT(rig.reports, ElementsAre(Report{key(7), TicketState::kDone, 303}));
  EXPECT_TRUE(rig.transfers.idle());
}

TEST(TransferEngine, AKeyInFlightIsNeverLoadedTwice) {
  Rig rig(4);
  const Ticket first = rig.ask(0);
  const Ticket queued = rig.ask(0);
  rig.step();
  const Ticket moving = rig.ask(0);
  rig.step();
  EXPECT_THAT(rig.started(), ElementsAre(0, 0));
  EXPECT_TRUE(first == queued && first == moving);
  EXPECT_EQ(rig.transfers.find(key(0)), first);
  rig.run();
  EXPECT_EQ(rig.reports.size(), 1U);
  EXPECT_FALSE(rig.transfers.find(key(0)).has_value());
  EXPECT_FALSE(rig.ask(0) == first) << "once it has finished, asking loads again";
}

TEST(TransferEngine, StartsTheBestRequestFirst) {
  Rig rig(1, 1);
  (void)rig.ask(0, Priority::kFurtherAhead, 0.9);
  (void)rig.ask(1, Priority::kNextLayer, 0.2);
  (void)rig.ask(2, Priority::kNextLayer, 0.8);
  (void)rig.ask(3, Priority::kNextLayer, 0.8);
  (void)rig.ask(4, Priority::kDemand, 0.1);
  (void)rig.ask(5, Priority::kDemand, 0.9);
  (void)rig.ask(6, Priority::kNextLayer, std::nan(""));
  rig.run();
  EXPECT_THAT(rig.started(), ElementsAre(4, 5, 2, 3, 1, 6, 0))
      << "demands in the order of asking, then hints by layer, probability, asking";
}

TEST(TransferEngine, ADemandOvertakesHintsBetweenTheirChunks) {
  Rig rig(1, 3);
  (void)rig.hint(0);
  (void)rig.hint(1);
  rig.step();
  (void)rig.ask(2);
  rig.run();
  EXPECT_THAT(rig.started(), ElementsAre(0, 2, 2, 2, 0, 0, 1, 1, 1));
}

TEST(TransferEngine, AHintThatIsDemandedOvertakesTheHintsBeforeIt) {
  Rig rig(1, 1);
  (void)rig.hint(0, 0.9);
  (void)rig.hint(1, 0.8);
  (void)rig.hint(2, 0.1);
  rig.transfers.promote(key(2), Priority::kDemand);
  (void)rig.ask(1);
  rig.run();
  EXPECT_THAT(rig.started(), ElementsAre(1, 2, 0));
}

TEST(TransferEngine, PromotingNeverLowersAPriority) {
  Rig rig(1, 1);
  (void)rig.hint(0, 0.9);
  (void)rig.ask(1);
  rig.transfers.promote(key(1), Priority::kFurtherAhead);
  (void)rig.ask(1, Priority::kNextLayer, 0.1);
  rig.transfers.promote(key(9), Priority::kDemand);  // unknown: nothing happens
  rig.run();
  EXPECT_THAT(rig.started(), ElementsAre(1, 0));
}

TEST(TransferEngine, HintsTakeAtMostHalfOfTheLink) {
  for (const auto& [depth, most] :
       std::vector<std::pair<int, int>>{{1, 1}, {2, 1}, {4, 2}, {5, 2}}) {
    Rig rig(depth, 3);
    for (std::int32_t expert = 0; expert < 6; ++expert) (void)rig.hint(expert);
    rig.step();
    EXPECT_EQ(rig.transfers.depth().in_flight, most) << "depth " << depth;
    EXPECT_EQ(rig.transfers.depth().hints_in_flight, most) << "depth " << depth;
    (void)rig.ask(9);
    rig.step();
    EXPECT_EQ(rig.transfers.depth().in_flight, std::min(depth, most + 3)) << "depth " << depth;
    rig.run();
    EXPECT_TRUE(rig.transfers.idle());
  }
}

TEST(TransferEngine, ChunksOfAPromotedHintNoLongerCountAsHints) {
  Rig rig(4, 2);
  (void)rig.hint(0);
  (void)rig.hint(1);
  rig.step();
  EXPECT_EQ(rig.transfers.depth().hints_in_flight, 2);
  rig.transfers.promote(key(0), Priority::kDemand);
  EXPECT_EQ(rig.transfers.depth().hints_in_flight, 0);
  rig.step();
  EXPECT_EQ(rig.transfers.depth().in_flight, 4);
  EXPECT_EQ(rig.transfers.depth().hints_in_flight, 2);
}

TEST(TransferEngine, AQueuedHintIsCancelledAtOnce) {
  Rig rig(2);
  const Ticket ticket = rig.hint(0);
  EXPECT_TRUE(rig.transfers.cancel(key(0)));
  EXPECT_EQ(ticket.state(), TicketState::kCancelled);
  EXPECT_NO_THROW(ticket.rethrow());
  EXPECT_THAT(rig.reports, ElementsAre(Report{key(0), TicketState::kCancelled, 0}));
  EXPECT_FALSE(rig.transfers.cancel(key(0))) << "it is gone";
  rig.run();
  EXPECT_TRUE(rig.started().empty());
}

TEST(TransferEngine, ACancelledHintEndsWhenItsChunksInFlightHaveLanded) {
  Rig rig(4, 5);
  const Ticket ticket = rig.hint(0);
  rig.step();
  EXPECT_TRUE(rig.transfers.cancel(key(0)));
  EXPECT_FALSE(ticket.finished()) << "its slot is still being written";
  rig.step();
  EXPECT_TRUE(rig.link.land());
  EXPECT_FALSE(ticket.finished());
  EXPECT_TRUE(rig.link.land());
  EXPECT_EQ(ticket.state(), TicketState::kCancelled);
  EXPECT_THAT(rig.reports, ElementsAre(Report{key(0), TicketState::kCancelled, 201}));
  EXPECT_THAT(rig.started(), ElementsAre(0, 0));
}

TEST(TransferEngine, ADemandIsNotCancelledUnlessToldSo) {
  Rig rig(2);
  const Ticket ticket = rig.ask(0);
  EXPECT_FALSE(rig.transfers.cancel(key(0)));
  EXPECT_FALSE(ticket.finished());
  EXPECT_TRUE(rig.transfers.cancel(key(0), true));
  EXPECT_EQ(ticket.state(), TicketState::kCancelled);
}

TEST(TransferEngine, AskingAgainRevivesACancelledHintWhereItStopped) {
  for (const bool by_promotion : {false, true}) {
    Rig rig(2, 4);
    const Ticket ticket = rig.hint(0);
    rig.step();
    EXPECT_TRUE(rig.transfers.cancel(key(0)));
    if (by_promotion) {
      rig.transfers.promote(key(0), Priority::kDemand);
    } else {
      EXPECT_EQ(rig.ask(0), ticket);
    }
    rig.run();
    EXPECT_EQ(ticket.state(), TicketState::kDone);
    std::vector<std::int32_t> chunks;
    for (const ChunkCopy& copy : rig.link.history()) chunks.push_back(copy.chunk);
    EXPECT_THAT(chunks, ElementsAre(0, 1, 2, 3)) << "no chunk twice, none left out";
    EXPECT_EQ(rig.reports.size(), 1U);
  }
}

TEST(TransferEngine, AFailedLoadWaitsForItsChunksInFlightThenFailsEveryWaiter) {
  Rig rig(4, 6);
  const Ticket ticket = rig.ask(0);
  const Ticket sharer = rig.ask(0);
  rig.step();
  EXPECT_TRUE(rig.link.fail(2, "the disk is gone"));
  rig.step();
  EXPECT_THAT(rig.started(), ElementsAre(0, 0, 0, 0)) << "a failed load starts no more chunks";
  EXPECT_TRUE(rig.link.land());
  EXPECT_TRUE(rig.link.fail(0, "a second error"));
  EXPECT_FALSE(ticket.finished()) << "a chunk is still being written";
  EXPECT_EQ(rig.ask(0), ticket) << "who asks now waits for the same error";
  EXPECT_TRUE(rig.link.land());
  for (const Ticket& each : {ticket, sharer}) {
    EXPECT_EQ(each.state(), TicketState::kFailed);
    try {
      each.rethrow();
      ADD_FAILURE() << "the error did not reach the waiter";
    } catch (const std::runtime_error& error) {
      EXPECT_STREQ(error.what(), "the disk is gone") << "the first error is the cause";
    }
  }
  EXPECT_THAT(rig.reports, ElementsAre(Report{key(0), TicketState::kFailed, 406}));
  rig.run();
  EXPECT_EQ(rig.started().size(), 4U);
}

TEST(TransferEngine, OneFailureLeavesOtherLoadsAlone) {
  Rig rig(4, 2);
  const Ticket broken = rig.ask(0);
  const Ticket whole = rig.ask(1);
  rig.step();
  EXPECT_TRUE(rig.link.fail(key(0), "torn"));
  rig.run();
  EXPECT_EQ(broken.state(), TicketState::kFailed);
  EXPECT_EQ(whole.state(), TicketState::kDone);
  EXPECT_FALSE(rig.ask(0) == broken);
  rig.run();
  EXPECT_EQ(rig.reports.back(), (Report{key(0), TicketState::kDone, 201}));
}

TEST(TransferEngine, AnErrorOutlivesACancel) {
  Rig rig(2, 2);
  const Ticket ticket = rig.hint(0);
  rig.step();
  EXPECT_TRUE(rig.transfers.cancel(key(0)));
  EXPECT_TRUE(rig.link.fail(0, "torn"));
  EXPECT_EQ(ticket.state(), TicketState::kFailed);
}

TEST(TransferEngine, AChunkThatTheLinkRefusesFailsItsLoad) {
  Rig rig(2, 2);
  const Ticket ticket = rig.ask(0);
  rig.link.refuse_next();
  rig.step();
  EXPECT_EQ(ticket.state(), TicketState::kFailed);
  EXPECT_THROW(ticket.rethrow(), std::runtime_error);
  EXPECT_TRUE(rig.transfers.idle());
}

TEST(TransferEngine, ADeadlineDropsAHintThatHasNotStarted) {
  Rig rig(2, 2);
  const Ticket moving = rig.hint(0, 0.9, 1500);
  const Ticket late = rig.hint(1, 0.5, 1600);
  const Ticket later = rig.hint(2, 0.4, 1700);
  EXPECT_EQ(rig.transfers.step(1499), 1600) << "the one that started has no deadline any more";
  EXPECT_EQ(rig.transfers.step(1600), 1700);
  EXPECT_EQ(late.state(), TicketState::kCancelled);
  EXPECT_FALSE(moving.finished());
  EXPECT_FALSE(later.finished());
  EXPECT_TRUE(rig.link.land());
  EXPECT_TRUE(rig.transfers.cancel(key(0)));
  EXPECT_EQ(moving.state(), TicketState::kCancelled);
  EXPECT_EQ(rig.transfers.step(1699), kNever) << "the last one has started";
  rig.now = 1800;
  rig.run();
  EXPECT_EQ(later.state(), TicketState::kDone);
}

TEST(TransferEngine, ADemandHasNoDeadline) {
  Rig rig(1, 1);
  const Ticket busy = rig.ask(0);
  rig.step();
  const Ticket demand = rig.ask(1, Priority::kDemand, 1.0, 1100);
  const Ticket promoted = rig.hint(2, 0.5, 1100);
  rig.transfers.promote(key(2), Priority::kDemand);
  EXPECT_EQ(rig.transfers.step(5000), kNever);
  rig.run();
  EXPECT_EQ(demand.state(), TicketState::kDone);
  EXPECT_EQ(promoted.state(), TicketState::kDone);
}

TEST(TransferEngine, AHintAskedForTwiceKeepsTheLaterDeadline) {
  Rig rig(1, 1);
  (void)rig.ask(0);
  const Ticket ticket = rig.hint(1, 0.5, 1100);
  (void)rig.hint(1, 0.4, 1200);
  (void)rig.hint(1, 0.3, 1050);
  EXPECT_EQ(rig.transfers.step(1150), 1200);
  EXPECT_FALSE(ticket.finished());
  EXPECT_EQ(rig.transfers.step(1200), kNever);
  EXPECT_EQ(ticket.state(), TicketState::kCancelled);
}

TEST(TransferEngine, CancelAllDropsDemandsTooAndAwaitsWhatMoves) {
  Rig rig(2, 2);
  const Ticket moving = rig.ask(0);
  rig.step();
  const Ticket queued = rig.ask(1);
  const Ticket guess = rig.hint(2);
  rig.transfers.cancel_all();
  EXPECT_EQ(queued.state(), TicketState::kCancelled);
  EXPECT_EQ(guess.state(), TicketState::kCancelled);
  EXPECT_FALSE(moving.finished());
  EXPECT_FALSE(rig.transfers.idle());
  rig.transfers.cancel_all();
  EXPECT_TRUE(rig.link.land());
  EXPECT_TRUE(rig.link.land());
  EXPECT_EQ(moving.state(), TicketState::kCancelled);
  EXPECT_TRUE(rig.transfers.idle());
  EXPECT_EQ(rig.reports.size(), 3U);
}

TEST(TransferEngine, TheCallbackRunsBeforeTheTicketResolvesAndLateAskersShareIt) {
  for (const bool fails : {false, true}) {
    Rig rig(2, 1);
    const Ticket ticket = rig.ask(0);
    int calls = 0;
    rig.on_finished = [&](const LoadRequest& request, TicketState state) {
      ++calls;
      EXPECT_EQ(state, fails ? TicketState::kFailed : TicketState::kDone);
      EXPECT_FALSE(ticket.finished()) << "a waiter woke before the slot was ready";
      EXPECT_FALSE(rig.transfers.idle());
      EXPECT_EQ(rig.transfers.find(request.key), ticket);
      EXPECT_EQ(rig.transfers.submit({.key = request.key}), ticket);
      EXPECT_FALSE(rig.transfers.cancel(request.key, true)) << "it has ended";
      rig.transfers.promote(request.key, Priority::kDemand);
      rig.transfers.cancel_all();
      (void)rig.transfers.step(1);  // the lock is free: the callback may use the engine
    };
    rig.step();
    EXPECT_TRUE(fails ? rig.link.fail(0, "torn") : rig.link.land());
    EXPECT_EQ(calls, 1);
    EXPECT_EQ(ticket.state(), fails ? TicketState::kFailed : TicketState::kDone);
    EXPECT_TRUE(rig.transfers.idle());
  }
}

TEST(TransferEngine, WhoBringsANewSlotWhileAFailureIsReportedBeginsAnew) {
  Rig rig(2, 1);
  const Ticket failed = rig.ask(0);
  Ticket anew;
  rig.on_finished = [&](const LoadRequest&, TicketState state) {
    if (state == TicketState::kFailed) anew = rig.ask(0);
  };
  rig.step();
  EXPECT_TRUE(rig.link.fail(0, "torn"));
  EXPECT_EQ(failed.state(), TicketState::kFailed);
  EXPECT_FALSE(anew == failed);
  EXPECT_EQ(rig.transfers.find(key(0)), anew) << "the old request must not take the new one along";
  rig.run();
  EXPECT_EQ(anew.state(), TicketState::kDone);
}

TEST(TransferEngine, ACallbackThatThrowsFailsItsTicket) {
  Rig rig(2, 1);
  const Ticket ticket = rig.ask(0);
  rig.on_finished = [](const LoadRequest&, TicketState) { throw InternalError("no such slot"); };
  rig.run();
  EXPECT_EQ(ticket.state(), TicketState::kFailed);
  EXPECT_THROW(ticket.rethrow(), InternalError);
  EXPECT_TRUE(rig.transfers.idle());
}

TEST(TransferEngine, ATokenThatIsNotInFlightIsAnInternalError) {
  Rig rig(2, 1);
  EXPECT_THROW(rig.transfers.landed(1, nullptr, 0), InternalError);
  (void)rig.ask(0);
  rig.step();
  const std::uint64_t token = rig.link.waiting()[0].token;
  EXPECT_TRUE(rig.link.land());
  try {
    rig.transfers.landed(token, nullptr, 0);
    FAIL() << "a chunk landed twice";
  } catch (const InternalError& error) {
    EXPECT_THAT(error.what(), HasSubstr("got token " + std::to_string(token)));
  }
}

TEST(TransferEngine, ANewLoadNeedsASlotAndChunks) {
  Rig rig(2, 1);
  EXPECT_THROW((void)rig.transfers.submit({.key = key(0)}), InternalError);
  rig.chunks.set(key(1), 0);
  EXPECT_THROW((void)rig.ask(1), InternalError);
  EXPECT_TRUE(rig.transfers.idle());
}

TEST(TransferEngine, HandsTheSlotsLastUseToTheLinkWhichWaitsForIt) {
  SteppedDevice device;
  Rig rig(2, 2, &device);
  const EventHandle last_use = device.record(StreamHandle{0});
  const Ticket ticket =
      rig.transfers.submit({.key = key(0), .slot = rig.slots.data(), .last_use = last_use});
  rig.step();
  EXPECT_FALSE(rig.link.land()) << "the slot is still being read";
  EXPECT_TRUE(device.step(StreamHandle{0}));
  rig.run();
  EXPECT_EQ(ticket.state(), TicketState::kDone);
  device.release(last_use);
  EXPECT_EQ(device.num_live_events(), 0U);
}

TEST(TransferEngine, CountsWhatWaitsAndWhatMoves) {
  Rig rig(2, 3);
  (void)rig.ask(0);
  (void)rig.hint(1);
  TransferEngine::Depth depth = rig.transfers.depth();
  EXPECT_EQ(depth.queued, 2);
  EXPECT_EQ(depth.in_flight, 0);
  rig.step();
  depth = rig.transfers.depth();
  EXPECT_EQ(depth.queued, 2) << "the demand has a third chunk";
  EXPECT_EQ(depth.in_flight, 2);
  EXPECT_EQ(depth.hints_in_flight, 0);
  rig.run();
  depth = rig.transfers.depth();
  EXPECT_EQ(depth.queued + depth.in_flight + depth.hints_in_flight, 0);
}

TEST(Ticket, OutlivesItsEngine) {
  Ticket done;
  Ticket left;
  {
    Rig rig(1, 1);
    done = rig.ask(0);
    left = rig.ask(1);
    rig.step();
    EXPECT_TRUE(rig.link.land());
  }
  EXPECT_EQ(done.state(), TicketState::kDone);
  EXPECT_EQ(left.state(), TicketState::kCancelled) << "nobody may wait for ever";
}

TEST(Ticket, AnEmptyOneIsAnInternalError) {
  const Ticket empty;
  EXPECT_FALSE(static_cast<bool>(empty));
  EXPECT_THROW((void)empty.state(), InternalError);
  EXPECT_THROW(empty.rethrow(), InternalError);
}

}  // namespace
}  // namespace sluice
