#include "transfer/disk_link.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <numeric>
#include <vector>

#include "base/clock.h"
#include "base/error.h"
#include "base/mutex.h"
#include "transfer/transfer_engine.h"

namespace sluice {
namespace {

constexpr std::int32_t kExperts = 6;
constexpr ExpertLayout kLayout{.dtype = DType::kF32, .hidden = 64, .intermediate = 64};

/// A store over memory that holds different numbers for each expert.
struct Stored final : ChunkSource {
  std::vector<std::vector<float>> experts;
  std::shared_ptr<const ExpertStore> store;

  Stored() {
    ExpertStoreBuilder builder({.chunk_bytes = 4096});
    const LayerIdx layer =
        builder.add_layer({.name = "m", .num_experts = kExperts, .layout = kLayout});
    for (std::int32_t e = 0; e < kExperts; ++e) {
      std::vector<float>& values = experts.emplace_back(kLayout.bytes() / sizeof(float));
      std::iota(values.begin(), values.end(), static_cast<float>(e) * 100'000);
      builder.add_piece(
          {layer, ExpertIdx{e}},
          {.offset = reinterpret_cast<std::uintptr_t>(values.data()), .bytes = kLayout.bytes()});
    }
    store = builder.build();
  }
  [[nodiscard]] std::int32_t num_chunks(ExpertKey key) const override {
    return store->num_chunks(key);
  }
  [[nodiscard]] std::size_t chunk_bytes(ExpertKey key, std::int32_t chunk) const override {
    return store->chunk_bytes(key, chunk);
  }
};

TEST(DiskLink, BringsEveryExpertItsBytesOnItsOwnThreads) {
  const Stored stored;
  const SteadyClock clock;
  Mutex mutex;
  CondVar resolved;
  const std::unique_ptr<Link> link = make_disk_link(stored.store, 3);
  EXPECT_EQ(link->depth(), 3);
  TransferEngine transfers(
      stored, *link, [](const LoadRequest&, TicketState, std::exception_ptr, std::uint64_t) {});
  link->set_landed([&](std::uint64_t token, std::exception_ptr error, std::uint64_t bytes_read) {
    transfers.landed(token, std::move(error), bytes_read);
    (void)transfers.step(clock.now());
    const MutexLock lock(mutex);
    resolved.notify_all();
  });

  std::vector<std::vector<float>> slots(kExperts);
  std::vector<Ticket> tickets;
  for (std::int32_t e = 0; e < kExperts; ++e) {
    std::vector<float>& slot = slots[static_cast<std::size_t>(e)];
    slot.resize(kLayout.bytes() / sizeof(float));
    tickets.push_back(
        transfers.submit({.key = make_key(0, e),
                          .slot = reinterpret_cast<std::byte*>(slot.data()),
                          .priority = e % 2 == 0 ? Priority::kDemand : Priority::kNextLayer}));
  }
  (void)transfers.step(clock.now());
  {
    const MutexLock lock(mutex);
    while (
        !std::all_of(tickets.begin(), tickets.end(), [](const Ticket& t) { return t.finished(); }))
      resolved.wait(mutex);
  }
  for (const Ticket& ticket : tickets) {
    ticket.rethrow();
    EXPECT_EQ(ticket.state(), TicketState::kDone);
  }
  EXPECT_EQ(slots, stored.experts);
  link->close();
  EXPECT_TRUE(transfers.idle());
}

TEST(DiskLink, ALoadOnAClosedLinkFailsInsteadOfWaitingForEver) {
  const Stored stored;
  const std::unique_ptr<Link> link = make_disk_link(stored.store, 1);
  TransferEngine transfers(
      stored, *link, [](const LoadRequest&, TicketState, std::exception_ptr, std::uint64_t) {});
  link->set_landed([](std::uint64_t, std::exception_ptr, std::uint64_t) {});
  link->close();
  link->close();
  std::vector<std::byte> slot(kLayout.bytes());
  const Ticket ticket = transfers.submit({.key = make_key(0, 0), .slot = slot.data()});
  (void)transfers.step(0);
  EXPECT_EQ(ticket.state(), TicketState::kFailed);
  EXPECT_THROW(ticket.rethrow(), InternalError);
}

}  // namespace
}  // namespace sluice
