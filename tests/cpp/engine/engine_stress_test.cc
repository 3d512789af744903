// The engine over the real disk link: threads that read, forward, guess, watch, drain and close.
// ThreadSanitizer judges; the bits are compared as everywhere.
#include <gtest/gtest.h>
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <thread>

#include "engine/plain.h"
#include "predict/scorers.h"
#include "store/temp_folder.h"
#include "support/seed.h"

namespace sluice::testing {
namespace {

struct EngineStress : ::testing::Test {
  testing::TempFolder folder;
  ModelShape shape{.dtype = DType::kBF16, .has_bias = true};
  std::unique_ptr<Model> model;
  std::vector<Call> calls;
  std::vector<std::vector<std::byte>> expected;

  EngineStress() {
    shape.hidden = 64;
    shape.intermediate = 48;
    shape.file = folder.file("experts.bin");
    model = std::make_unique<Model>(shape, 5);
    std::mt19937_64 rng(test_seed());
    PlainForward plain(*model);
    for (int i = 0; i < 24; ++i) {
      calls.push_back(make_call(shape, i % 2,
                                {.num_tokens = i % 6 == 5 ? 40 : 1,
                                 .top_k = 1 + i % 4,
                                 .activations = i % 2 == 0 ? DType::kBF16 : DType::kF32},
                                rng));
      expected.push_back(plain(calls.back()));
    }
  }

  [[nodiscard]] std::unique_ptr<Engine> open(std::int64_t slots, const std::string& policy) const {
    Engine::Parts parts;
    parts.store = model->store();
    parts.parallel = make_thread_pool(2);
    return std::make_unique<Engine>(
        EngineOptions{.device_memory = model->slots(slots), .policy = policy, .io_threads = 3},
        std::move(parts), model->specs());
  }
  void check(Engine& engine, std::size_t idx) const {
    std::vector<std::byte> out(calls[idx].hidden.size());
    engine.forward(calls[idx].args(out.data()));
    ASSERT_EQ(out, expected[idx]) << "call " << idx;
  }
};

TEST_F(EngineStress, ThreadsThatForwardGuessWatchAndDrainDisturbNoBits) {
  for (const std::int64_t slots : {1, 3, 9}) {
    const std::uint64_t read_before = model->store()->counters().bytes_read;
    const auto engine = open(slots, slots == 1 ? "decayed-lfu" : slots == 3 ? "lru" : "forecast");
    std::atomic<bool> stop{false};
    std::vector<std::jthread> threads;
    for (int t = 0; t < 2; ++t) {
      threads.emplace_back([&, t] {
        std::mt19937_64 rng(test_seed() + static_cast<std::uint64_t>(t));
        for (int i = 0; i < 150; ++i) check(*engine, rng() % calls.size());
        if (t == 0) stop = true;
      });
    }
    threads.emplace_back([&] {
      std::mt19937_64 rng(test_seed());
      while (!stop) {
        const Hint hint{.key = make_key(static_cast<std::int32_t>(rng() % 2),
                                        static_cast<std::int32_t>(rng() % 8)),
                        .probability = static_cast<double>(1 + rng() % 9) / 10};
        engine->hint({&hint, 1});
        std::this_thread::sleep_for(std::chrono::microseconds(50));
      }
    });
    threads.emplace_back([&] {
      std::mt19937_64 rng(test_seed());
      std::vector<float> row(8);
      std::int64_t scorer = 0;
      while (!stop) {
        for (float& score : row) score = static_cast<float>(rng() % 100);
        engine->publish(LayerIdx{static_cast<std::int32_t>(rng() % 2)}, row);
        const bool guesses = rng() % 2 == 0;
        engine->remove_scorer(scorer);
        if (guesses) {
          scorer = engine->add_scorer(make_pair_scorer(std::vector<float>(2 * 8 * 8, 0.5F), 2, 8));
        }
        engine->begin_step({.requests = {}, .tokens = 1, .token_ids = {}});
        std::this_thread::sleep_for(std::chrono::microseconds(200));
      }
    });
    threads.emplace_back([&] {
      while (!stop) {
        const EngineStats stats = engine->stats();
        EXPECT_EQ(stats.requests, stats.hits + stats.late + stats.misses);
        EXPECT_LE(stats.resident_bytes, stats.budget_bytes);
        (void)engine->residency();
        (void)engine->timeline().snapshot();
        engine->drain();
        std::this_thread::sleep_for(std::chrono::milliseconds(1));
      }
    });
    threads.clear();
    engine->drain();
    const EngineStats stats = engine->stats();
    EXPECT_EQ(stats.forwards, 300);
    EXPECT_EQ(stats.bytes_read, model->store()->counters().bytes_read - read_before);
    EXPECT_GT(stats.bytes_read_demand, 0u);
    EXPECT_GT(stats.workspace_bytes, 0u);
    EXPECT_EQ(stats.bytes_read, stats.bytes_read_demand + stats.bytes_read_hint_used +
                                    stats.bytes_read_hint_wasted + stats.bytes_read_hint_pending);
  }
}

TEST_F(EngineStress, CloseFromAnotherThreadLetsTheRunningForwardFinish) {
  for (int round = 0; round < 20; ++round) {
    const auto engine = open(2, "lru");
    std::atomic<int> finished{0};
    std::jthread worker([&] {
      try {
        for (std::size_t i = 0;; ++i) {
          check(*engine, i % calls.size());
          ++finished;
        }
      } catch (const Error& error) {
        EXPECT_NE(std::string(error.what()).find("session closed"), std::string::npos);
      }
    });
    while (finished < round % 4) std::this_thread::yield();
    const std::vector<Hint> hints = {{.key = make_key(0, 1)}, {.key = make_key(1, 2)}};
    engine->hint(hints);
    std::jthread second([&] { engine->close(); });
    engine->close();
    worker.join();
    second.join();
    EXPECT_EQ(engine->stats().resident_bytes, 0u);
  }
}

TEST_F(EngineStress, AnEngineMayBeDestroyedWithReadsInFlight) {
  for (int round = 0; round < 20; ++round) {
    const auto engine = open(8, "lru");
    std::vector<Hint> hints;
    for (std::int32_t e = 0; e < 8; ++e) hints.push_back({.key = make_key(round % 2, e)});
    engine->hint(hints);
  }
}

#if !defined(__SANITIZE_THREAD__)
TEST_F(EngineStress, AForkedChildGetsANamedErrorAndNothingHangs) {
  auto engine = open(2, "lru");
  check(*engine, 0);
  const pid_t child = fork();
  ASSERT_GE(child, 0);
  if (child == 0) {
    bool refused = false;
    try {
      std::vector<std::byte> out(calls[0].hidden.size());
      engine->forward(calls[0].args(out.data()));
    } catch (const Error&) {
      refused = true;
    }
    engine->close();
    engine.reset();
    _exit(refused ? 0 : 1);
  }
  int status = 0;
  ASSERT_EQ(waitpid(child, &status, 0), child);
  EXPECT_TRUE(WIFEXITED(status) && WEXITSTATUS(status) == 0);
  check(*engine, 1);
}
#endif

}  // namespace
}  // namespace sluice::testing
