#include "engine/hint_queue.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <random>
#include <vector>

namespace sluice {
namespace {

Hint take(HintQueue& queue) {
  const Hint first = queue.front();
  queue.pop();
  return first;
}

TEST(HintQueue, GivesTheFirstDueFirstAndOfEqualsTheMostProbable) {
  HintQueue queue;
  const auto add = [&](std::int32_t expert, double probability, Nanos deadline) {
    EXPECT_EQ(
        queue.push({.key = make_key(0, expert), .probability = probability, .deadline = deadline}),
        0);
  };
  add(0, 0.9, kNever);
  add(1, 0.5, 20);
  add(2, 0.7, 20);
  add(3, 0.3, 10);
  add(4, 0.5, 20);
  std::vector<std::int32_t> order;
  for (; !queue.empty(); queue.pop()) order.push_back(to_int(queue.front().key.expert));
  EXPECT_EQ(order, (std::vector<std::int32_t>{3, 2, 1, 4, 0}));
}

// Against every subset of six jobs: what stays can all begin in time, and is worth the most.
TEST(HintQueue, KeepsTheMostValuableOfWhatCanBeInTime) {
  constexpr std::uint32_t kJobs = 6;
  std::mt19937 random(7);
  for (int round = 0; round < 2000; ++round) {
    const Nanos load_time = static_cast<Nanos>(random() % 4);
    const Nanos now = static_cast<Nanos>(random() % 10);
    std::vector<Hint> jobs;
    HintQueue queue;
    for (std::uint32_t i = 0; i < kJobs; ++i) {
      const bool never = random() % 8 == 0;
      jobs.push_back({.key = make_key(0, static_cast<std::int32_t>(i)),
                      .probability = static_cast<double>(1U + random() % 16U) / 16,
                      .deadline = never ? kNever : static_cast<Nanos>(random() % 20)});
      ASSERT_EQ(queue.push(jobs.back()), 0);
    }
    std::ranges::sort(jobs, {}, &Hint::deadline);
    double best = 0;
    for (std::uint32_t set = 0; set < 1U << kJobs; ++set) {
      Nanos begins = now;
      double worth = 0;
      bool in_time = true;
      for (std::uint32_t i = 0; i < kJobs; ++i) {
        if ((set >> i & 1U) == 0) continue;
        in_time = in_time && begins < jobs[i].deadline;
        begins += load_time;
        worth += jobs[i].probability;
      }
      if (in_time) best = std::max(best, worth);
    }
    int kept = 0;
    const int dropped = queue.drop_late(now, load_time);
    double worth = 0;
    Nanos begins = now;
    for (; !queue.empty(); queue.pop(), ++kept) {
      EXPECT_LT(begins, queue.front().deadline);
      begins += load_time;
      worth += queue.front().probability;
    }
    ASSERT_DOUBLE_EQ(worth, best) << "round " << round;
    ASSERT_EQ(kept + dropped, static_cast<int>(kJobs));
  }
}

TEST(HintQueue, ForgetsTheLeastProbableWhenFull) {
  HintQueue queue;
  for (std::int32_t e = 0; e < static_cast<std::int32_t>(HintQueue::kCapacity); ++e) {
    EXPECT_EQ(queue.push({.key = make_key(0, e), .probability = 0.5}), 0);
  }
  EXPECT_EQ(queue.push({.key = make_key(0, 3), .probability = 0.9}), 1) << "replaces itself";
  EXPECT_EQ(queue.push({.key = make_key(1, 0), .probability = 0.1}), 1) << "worth less than all";
  EXPECT_EQ(queue.push({.key = make_key(1, 1), .probability = 0.8}), 1);
  EXPECT_EQ(take(queue).key, make_key(0, 3));
  EXPECT_EQ(take(queue).key, make_key(1, 1));
  EXPECT_EQ(take(queue).probability, 0.5);
  EXPECT_EQ(queue.clear(), static_cast<std::int64_t>(HintQueue::kCapacity) - 3);
  const ExpertKey key = make_key(0, 1);
  EXPECT_EQ(queue.push({.key = key, .probability = 0.4}), 0);
  EXPECT_EQ(queue.push({.key = key, .probability = 0.9}), 1);
  EXPECT_EQ(queue.push({.key = key, .probability = 0.5}), 1)
      << "of two for one the higher probability stays";
  EXPECT_EQ(take(queue).probability, 0.9);
  EXPECT_EQ(queue.push({.key = key, .probability = 0.9, .deadline = 100}), 0);
  EXPECT_EQ(queue.push({.key = key, .probability = 0.5, .deadline = 200}), 1);
  EXPECT_EQ(queue.drop_late(100, 1), 0) << "the newer one is not late";
  EXPECT_EQ(take(queue).deadline, 200);
  EXPECT_TRUE(queue.empty());
}

}  // namespace
}  // namespace sluice
