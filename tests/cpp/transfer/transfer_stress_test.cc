// Threads that ask, cancel, raise and evict at once over a link with threads of its own. Meant for
// the thread sanitizer; what it asserts holds at any speed.
#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <chrono>
#include <cstring>
#include <iostream>
#include <map>
#include <optional>
#include <random>
#include <stdexcept>
#include <thread>
#include <vector>

#include "base/clock.h"
#include "base/mutex.h"
#include "cache/slot_cache.h"
#include "support/seed.h"
#include "transfer/transfer_engine.h"

namespace sluice {
namespace {

constexpr std::int32_t kExperts = 24;
constexpr std::int32_t kSlots = 8;
constexpr std::int32_t kChunks = 3;
constexpr int kDepth = 4;
constexpr int kCallers = 3;
constexpr int kRounds = 10000;

/// A link of `kDepth` threads, as a reader pool has them; every fiftieth chunk fails.
class ThreadedLink final : public Link {
 public:
  explicit ThreadedLink(std::uint64_t seed) {
    for (int i = 0; i < kDepth; ++i)
      threads_.emplace_back([this, seed, i] { work(seed + static_cast<std::uint64_t>(i)); });
  }
  ~ThreadedLink() override { close(); }

  [[nodiscard]] int depth() const override { return kDepth; }
  void set_landed(Landed landed) override { landed_ = std::move(landed); }
  void start(const ChunkCopy& copy) override EXCLUDES(mu_) {
    MutexLock lock(mu_);
    queue_.push_back(copy);
    changed_.notify_one();
  }
  void close() override EXCLUDES(mu_) {
    {
      MutexLock lock(mu_);
      closed_ = true;
      changed_.notify_all();
    }
    threads_.clear();
  }

 private:
  void work(std::uint64_t seed) EXCLUDES(mu_) {
    std::mt19937_64 random(seed);
    for (;;) {
      ChunkCopy copy;
      {
        MutexLock lock(mu_);
        while (queue_.empty() && !closed_) changed_.wait(mu_);
        if (queue_.empty()) return;
        copy = queue_.front();
        queue_.erase(queue_.begin());
      }
      std::exception_ptr error;
      if (random() % 50 == 0) {
        error = std::make_exception_ptr(std::runtime_error("planned failure"));
      } else {
        const std::int32_t value = to_int(copy.key.expert);
        std::memcpy(copy.slot + sizeof(value) * static_cast<std::size_t>(copy.chunk), &value,
                    sizeof(value));
      }
      landed_(copy.token, std::move(error), copy.bytes);
    }
  }

  Mutex mu_;
  CondVar changed_;
  std::vector<ChunkCopy> queue_ GUARDED_BY(mu_);
  bool closed_ GUARDED_BY(mu_) = false;
  Landed landed_;
  std::vector<std::jthread> threads_;
};

struct Chunks final : ChunkSource {
  [[nodiscard]] std::int32_t num_chunks(ExpertKey) const override { return kChunks; }
  [[nodiscard]] std::size_t chunk_bytes(ExpertKey, std::int32_t) const override {
    return sizeof(std::int32_t);
  }
};

class Stress {
 public:
  Stress()
      : cache_(kSlots, make_policy("decayed-lfu", {.num_layers = 1, .max_experts = kExperts})),
        link_(testing::test_seed()),
        transfers_(chunks_, link_,
                   [this](const LoadRequest& request, TicketState state, std::exception_ptr,
                          std::uint64_t) { finished(request.key, state == TicketState::kDone); }) {
    link_.set_landed([this](std::uint64_t token, std::exception_ptr error, std::uint64_t bytes) {
      transfers_.landed(token, std::move(error), bytes);
      (void)transfers_.step(clock_.now());
      wake();
    });
  }

  void run() {
    {
      std::vector<std::jthread> threads;
      for (int i = 0; i < kCallers; ++i) {
        threads.emplace_back([this, i] { call(testing::test_seed() + 100 + i); });
      }
      threads.emplace_back([this] { disturb(testing::test_seed() + 200); });
    }
    transfers_.cancel_all();
    wait_until([&] { return transfers_.idle(); });
    link_.close();
    EXPECT_EQ(cache_.num_leases(), 0);
    for (const SlotCache::SlotView& slot : cache_.snapshot())
      EXPECT_NE(slot.state, SlotState::kLoading) << "a slot was left loading";
    EXPECT_EQ(ends_, begins_) << "each load ends once";
    EXPECT_EQ(served_ + failures_, kCallers * kRounds) << "each demand is served, or fails by name";
    EXPECT_GT(served_, 0);
    EXPECT_GT(failures_, 0);
    std::cout << served_ << " demands served, " << failures_ << " failed, " << asked_again_
              << " asked again after a cancel, " << begins_ << " loads, seed "
              << testing::test_seed() << "\n";
  }

 private:
  struct Waiter {
    ExpertKey key;
    std::optional<SlotLease> lease;
  };

  // As the engine does: whoever waits for a load gets his lease with its end. Did he take it later,
  // others could evict the expert each time before he wakes.
  void finished(ExpertKey key, bool done) EXCLUDES(asking_) {
    MutexLock lock(asking_);
    if (done) {
      cache_.finish_load(key);
      for (Waiter* const waiter : waiters_)
        if (waiter->key == key) waiter->lease = cache_.find(key);
    } else {
      cache_.fail_load(key);
    }
    ++ends_;
  }

  // One expert at a time, as long as it takes: leased, checked, returned.
  void call(std::uint64_t seed) {
    std::mt19937_64 random(seed);
    for (int round = 0; round < kRounds; ++round) {
      const ExpertKey key = make_key(0, static_cast<std::int32_t>(random() % kExperts));
      try {
        use(demand(key), key);
        ++served_;
      } catch (const std::runtime_error& error) {
        EXPECT_STREQ(error.what(), "planned failure");
        ++failures_;
      }
    }
  }

  SlotLease demand(ExpertKey key) {
    const std::array<ExpertIdx, 1> ids = {key.expert};
    cache_.touch({.step = 0, .layer = key.layer, .experts = ids});
    Waiter waiter{.key = key, .lease = {}};
    for (;;) {
      const std::optional<Ticket> ticket = ask(waiter);
      if (!ticket && waiter.lease) return *std::move(waiter.lease);
      (void)transfers_.step(clock_.now());
      wake();         // a step may have ended somebody's ticket
      if (!ticket) {  // every slot is held
        std::this_thread::yield();
        continue;
      }
      wait_until([&] { return ticket->finished(); });
      leave(waiter);
      if (waiter.lease) return *std::move(waiter.lease);
      ticket->rethrow();
      if (ticket->state() == TicketState::kCancelled) ++asked_again_;
    }
  }

  // Leases what is here; else asks for it, and stands in line from then on.
  std::optional<Ticket> ask(Waiter& waiter) EXCLUDES(asking_) {
    MutexLock lock(asking_);
    waiter.lease = cache_.find(waiter.key);
    if (waiter.lease) return std::nullopt;
    const std::optional<Ticket> ticket = load_locked(waiter.key, SlotCache::Purpose::kDemand);
    if (ticket) waiters_.push_back(&waiter);
    return ticket;
  }
  void leave(Waiter& waiter) EXCLUDES(asking_) {
    MutexLock lock(asking_);
    waiters_.erase(std::find(waiters_.begin(), waiters_.end(), &waiter));
  }

  // The cache's answer and the request that follows from it are one step for other askers.
  std::optional<Ticket> load_locked(ExpertKey key, SlotCache::Purpose purpose) REQUIRES(asking_) {
    const bool is_demand = purpose == SlotCache::Purpose::kDemand;
    if (std::optional<Ticket> ticket = transfers_.find(key)) {
      if (is_demand) transfers_.promote(key, Priority::kDemand);
      return ticket;
    }
    const auto begun = cache_.begin_load(key, purpose);
    const auto* const slot = std::get_if<SlotIdx>(&begun);
    if (slot == nullptr) return std::nullopt;
    ++begins_;
    return transfers_.submit(
        {.key = key,
         .slot = reinterpret_cast<std::byte*>(slab_[static_cast<std::size_t>(*slot)].data()),
         .priority = is_demand ? Priority::kDemand : Priority::kNextLayer,
         .probability = 0.5,
         .deadline = is_demand ? kNever : clock_.now() + 200'000});
  }

  void use(const SlotLease& lease, ExpertKey key) {
    for (const std::int32_t value : slab_[static_cast<std::size_t>(lease.slot())])
      EXPECT_EQ(value, to_int(key.expert)) << "another expert's bytes under a lease";
  }

  void guess(ExpertKey key) EXCLUDES(asking_) {
    MutexLock lock(asking_);
    (void)load_locked(key, SlotCache::Purpose::kHint);
  }

  // Hints, cancels (of demands too, as an abandoned call does), evictions.
  void disturb(std::uint64_t seed) {
    std::mt19937_64 random(seed);
    while (served_ + failures_ < kCallers * kRounds) {
      const ExpertKey key = make_key(0, static_cast<std::int32_t>(random() % kExperts));
      switch (random() % 8) {
        case 0:
          if (transfers_.cancel(key, random() % 8 == 0)) wake();
          break;
        case 1:
          if (random() % 64 == 0) (void)cache_.evict_all();
          break;
        case 2:
          (void)transfers_.step(clock_.now());
          wake();
          break;
        case 3:
          (void)transfers_.depth();
          (void)cache_.snapshot();
          break;
        default:
          guess(key);
      }
      std::this_thread::sleep_for(std::chrono::microseconds(20));
    }
  }

  void wake() EXCLUDES(waiting_) {
    MutexLock lock(waiting_);
    resolved_.notify_all();
  }
  template <class Done>
  void wait_until(Done done) EXCLUDES(waiting_) {
    MutexLock lock(waiting_);
    while (!done()) resolved_.wait(waiting_);
  }

  SteadyClock clock_;
  Chunks chunks_;
  std::array<std::array<std::int32_t, kChunks>, kSlots> slab_{};
  SlotCache cache_;
  ThreadedLink link_;
  TransferEngine transfers_;
  Mutex asking_;
  std::vector<Waiter*> waiters_ GUARDED_BY(asking_);
  Mutex waiting_;
  CondVar resolved_;
  std::atomic<std::int64_t> begins_ = 0;
  std::atomic<std::int64_t> ends_ = 0;
  std::atomic<std::int64_t> served_ = 0;
  std::atomic<std::int64_t> failures_ = 0;
  std::atomic<std::int64_t> asked_again_ = 0;
};

TEST(TransferStress, ManyThreadsGetTheirExpertsOrTheirErrors) { Stress().run(); }

}  // namespace
}  // namespace sluice
