#include <gtest/gtest.h>
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <mutex>
#include <numeric>
#include <set>
#include <thread>
#include <vector>

#include "base/error.h"
#include "base/parallel.h"

namespace sluice {
namespace {

TEST(ThreadPool, EveryIndexRunsOnce) {
  for (const int threads : {1, 2, 3, 5}) {
    const auto pool = make_thread_pool(threads);
    EXPECT_EQ(pool->num_threads(), threads);
    for (const std::int64_t count : {0, 1, 2, 7, 64, 1000}) {
      for (const std::int64_t grain : {-1, 0, 1, 3, 100, 2000}) {
        std::vector<std::atomic<int>> seen(static_cast<std::size_t>(count));
        auto fn = [&](std::int64_t begin, std::int64_t end) {
          for (std::int64_t i = begin; i < end; ++i) seen[static_cast<std::size_t>(i)]++;
        };
        pool->run(count, grain, RangeFn(fn));
        for (const auto& times : seen) ASSERT_EQ(times.load(), 1);
      }
    }
  }
}

TEST(ThreadPool, OnlyTheLastRangeIsShorterThanTheGrain) {
  const auto pool = make_thread_pool(3);
  std::mutex mu;
  std::set<std::int64_t> short_ends;
  auto fn = [&](std::int64_t begin, std::int64_t end) {
    const std::lock_guard lock(mu);
    if (end - begin < 7) short_ends.insert(end);
  };
  for (std::int64_t count = 1; count < 300; ++count) {
    short_ends.clear();
    pool->run(count, 7, RangeFn(fn));
    for (const std::int64_t end : short_ends) ASSERT_EQ(end, count);
  }
}

TEST(ThreadPool, ResultsOfWorkersAreVisibleToTheCaller) {
  // Plain writes: the thread sanitizer sees an order that is missing.
  const auto pool = make_thread_pool(4);
  std::vector<std::int64_t> squares(500);
  for (std::int64_t round = 0; round < 2000; ++round) {
    auto fn = [&](std::int64_t begin, std::int64_t end) {
      for (std::int64_t i = begin; i < end; ++i) squares[static_cast<std::size_t>(i)] = i * round;
    };
    pool->run(500, 1, RangeFn(fn));
    ASSERT_EQ(std::accumulate(squares.begin(), squares.end(), std::int64_t{0}),
              round * 499 * 500 / 2);
  }
}

TEST(ThreadPool, WorkersThatParkedWakeAgain) {
  const auto pool = make_thread_pool(3);
  for (int round = 0; round < 30; ++round) {
    std::this_thread::sleep_for(std::chrono::milliseconds(1));  // far past the spin
    std::atomic<std::int64_t> sum = 0;
    std::atomic<int> inside = 0;
    auto fn = [&](std::int64_t begin, std::int64_t end) {
      // The ranges wait for each other: without a second thread this never ends.
      inside++;
      while (inside.load() < 2) std::this_thread::yield();
      sum += end - begin;
    };
    pool->run(4, 1, RangeFn(fn));
    ASSERT_EQ(sum.load(), 4);
  }
}

TEST(ThreadPool, ACallerThatWaitsLongIsWoken) {
  const auto pool = make_thread_pool(2);
  const auto caller = std::this_thread::get_id();
  std::atomic<bool> worker_began = false;
  std::atomic<bool> worker_ended = false;
  auto fn = [&](std::int64_t, std::int64_t) {
    if (std::this_thread::get_id() == caller) {
      while (!worker_began.load()) std::this_thread::yield();
    } else if (!worker_began.exchange(true)) {
      std::this_thread::sleep_for(std::chrono::milliseconds(20));
      worker_ended = true;
    }
  };
  pool->run(8, 1, RangeFn(fn));
  EXPECT_TRUE(worker_ended.load());
}

TEST(ThreadPool, PoolsComeAndGoAtAnyMoment) {
  for (int round = 0; round < 200; ++round) {
    const auto pool = make_thread_pool(1 + round % 4);
    std::atomic<int> sum = 0;
    auto fn = [&](std::int64_t begin, std::int64_t end) { sum += static_cast<int>(end - begin); };
    for (int i = 0; i < round % 3; ++i) pool->run(10, 1, RangeFn(fn));
    ASSERT_EQ(sum.load(), 10 * (round % 3));
  }
}

TEST(ThreadPool, SeveralPoolsWorkAtOnce) {
  std::vector<std::thread> users;
  std::atomic<std::int64_t> total = 0;
  for (int user = 0; user < 3; ++user) {
    users.emplace_back([&] {
      const auto pool = make_thread_pool(2);
      auto fn = [&](std::int64_t begin, std::int64_t end) { total += end - begin; };
      for (int i = 0; i < 300; ++i) pool->run(20, 1, RangeFn(fn));
    });
  }
  for (std::thread& user : users) user.join();
  EXPECT_EQ(total.load(), 3 * 300 * 20);
}

TEST(ThreadPool, RefusesLessThanOneThread) {
  EXPECT_THROW((void)make_thread_pool(0), ConfigError);
  EXPECT_THROW((void)make_thread_pool(-3), ConfigError);
}

#if !defined(__SANITIZE_THREAD__)  // the thread sanitizer does not follow a fork of threads
TEST(ThreadPool, InAForkedChildItRunsAndEndsWithoutItsWorkers) {
  auto pool = make_thread_pool(3);
  auto nothing = [](std::int64_t, std::int64_t) {};
  pool->run(100, 1, RangeFn(nothing));
  const pid_t child = fork();
  ASSERT_GE(child, 0);
  if (child == 0) {
    alarm(20);  // a child that hangs dies
    std::int64_t sum = 0;
    auto fn = [&](std::int64_t begin, std::int64_t end) { sum += end - begin; };
    pool->run(100, 1, RangeFn(fn));
    pool.reset();
    _exit(sum == 100 ? 0 : 1);
  }
  int status = 0;
  ASSERT_EQ(waitpid(child, &status, 0), child);
  EXPECT_TRUE(WIFEXITED(status) && WEXITSTATUS(status) == 0) << status;
}
#endif

TEST(SerialFor, RunsOnTheCallersThreadInOnePiece) {
  SerialFor serial;
  int calls = 0;
  auto fn = [&](std::int64_t begin, std::int64_t end) {
    ++calls;
    EXPECT_EQ(begin, 0);
    EXPECT_EQ(end, 9);
  };
  serial.run(9, 1, RangeFn(fn));
  serial.run(0, 1, RangeFn(fn));
  EXPECT_EQ(calls, 1);
}

}  // namespace
}  // namespace sluice
