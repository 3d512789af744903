// Several host threads on one session: forwards on streams of their own, guesses, looks, closes
// while everything is in flight. For TSan, and for what only real threads do.
#include <gtest/gtest.h>

#include <atomic>
#include <thread>

#include "base/error.h"
#include "tests/emulation/tier/cuda_rig.h"

namespace sluice::testing {
namespace {

struct Work {
  std::vector<Call> calls;
  std::vector<std::vector<std::byte>> expected;
};

Work make_work(const Model& model) {
  std::mt19937_64 rng(5);
  Work work;
  for (int i = 0; i < 8; ++i) {
    work.calls.push_back(make_call(
        model.shape(), i % 2,
        {.num_tokens = i == 3 ? 24 : 1 + i % 3, .activations = model.shape().dtype}, rng));
  }
  begin({.policy = fake::Policy::kEager});
  CudaRig rig(model, {.device_memory = model.slots(16), .host_memory = model.slots(16)}, false);
  for (const Call& call : work.calls) work.expected.push_back(rig.forward(call));
  return work;
}

/// One caller with a stream of its own, until `rounds` are done or the session is closed.
void call_often(Engine& engine, const Work& work, int rounds, std::uint64_t seed) {
  std::mt19937_64 rng(seed);
  cudaStream_t stream = nullptr;
  must(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
  for (int i = 0; i < rounds; ++i) {
    const std::size_t which = rng() % work.calls.size();
    const CallOnDevice on_device(work.calls[which], stream);
    try {
      engine.forward(on_device.args());
    } catch (const Error& error) {
      EXPECT_NE(std::string(error.what()).find("session closed"), std::string::npos)
          << error.what();
      break;
    }
    EXPECT_EQ(on_device.out(), work.expected[which]);
  }
  must(cudaStreamSynchronize(stream));
  must(cudaStreamDestroy(stream));
}

void guess_often(Engine& engine, const std::atomic<bool>& stop, std::uint64_t seed) {
  std::mt19937_64 rng(seed);
  while (!stop) {
    std::vector<Hint> hints;
    for (int i = 0; i < 3; ++i) {
      hints.push_back({.key = make_key(static_cast<std::int32_t>(rng() % 2),
                                       static_cast<std::int32_t>(rng() % 8)),
                       .probability = 0.1 * static_cast<double>(1 + rng() % 9)});
    }
    engine.hint(hints);
    (void)engine.stats();
    (void)engine.residency();
    std::this_thread::yield();
  }
}

class CudaStress : public ::testing::TestWithParam<fake::Policy> {};

TEST_P(CudaStress, CallersGuessesAndLooksAtOnce) {
  const Model model({.dtype = DType::kBF16}, 3);
  const Work work = make_work(model);
  for (const bool tight : {true, false}) {
    begin({.policy = GetParam()});
    {
      CudaRig rig(
          model,
          {.device_memory = model.slots(tight ? 2 : 6), .host_memory = model.slots(tight ? 3 : 16)},
          false);
      std::atomic<bool> stop{false};
      std::vector<std::jthread> threads;
      for (std::uint64_t i = 0; i < 2; ++i) {
        threads.emplace_back([&, i] { call_often(rig.engine(), work, 30, 100 + i); });
      }
      std::jthread guesser([&] { guess_often(rig.engine(), stop, 9); });
      threads.clear();
      stop = true;
      guesser.join();
      rig.engine().drain();
    }
    expect_nothing_left();
  }
}

TEST_P(CudaStress, CloseDuringFlight) {
  const Model model({.dtype = DType::kBF16}, 3);
  const Work work = make_work(model);
  for (std::uint64_t round = 0; round < 12; ++round) {
    begin({.policy = GetParam(), .seed = round + 1});
    {
      CudaRig rig(model,
                  {.device_memory = model.slots(2),
                   .host_memory = model.slots(4),
                   .host_tier = round % 2 == 0 ? "inclusive" : "none"},
                  false);
      std::atomic<bool> stop{false};
      std::jthread caller([&] { call_often(rig.engine(), work, 1000, round); });
      std::jthread guesser([&] { guess_often(rig.engine(), stop, round); });
      std::this_thread::sleep_for(std::chrono::milliseconds(round * 2));
      rig.engine().close();
      caller.join();
      stop = true;
      guesser.join();
    }
    expect_nothing_left();
  }
}

INSTANTIATE_TEST_SUITE_P(Policies, CudaStress,
                         ::testing::Values(fake::Policy::kEager, fake::Policy::kLazy,
                                           fake::Policy::kAhead, fake::Policy::kRandom));

}  // namespace
}  // namespace sluice::testing
