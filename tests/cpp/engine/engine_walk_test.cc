// A random walk of cache, transfer engine and engine on the stepped device: forwards, guesses,
// landings, failures and interrupts in any order, each step checked against what must hold.
#include <gtest/gtest.h>

#include "engine/plain.h"
#include "engine/rig.h"
#include "support/coverage.h"
#include "support/seed.h"

namespace sluice::testing {
namespace {

constexpr int kSteps = 100'000;
constexpr std::int64_t kLeast = 100;

using Pools = std::vector<std::vector<SlotCache::SlotView>>;

/// One rig of the walk and what is known of it.
class Walker {
 public:
  Walker(const Model& model, const std::vector<Call>& calls,
         const std::vector<std::vector<std::byte>>& expected, std::uint64_t seed,
         Coverage& coverage)
      : model_(model),
        calls_(calls),
        expected_(expected),
        coverage_(coverage),
        policy_(policy_names()[seed % policy_names().size()]),
        slots_(std::array{1, 2, 3, 5, 8, 16}[seed / 5 % 6]),
        rig_(model, {.device_memory = model.slots(slots_),
                     .policy = policy_,
                     .depth = static_cast<int>(1 + seed % 5),
                     .seed = seed,
                     .events_pass_at_once = seed % 2 == 0}),
        before_(rig_.engine().residency()) {
    rig_.failures_per_mille = seed % 3 == 0 ? 30 : 0;
    rig_.on_drive = [this] {
      if (rig_.rng()() % 4 == 0) guess();
      rig_.land_one();
      ++num_steps_;
      look();
    };
    rig_.interrupt = [this] { return rig_.rng()() % 400 == 0; };
  }

  /// Walks until about `steps` things have happened.
  void walk(int steps) {
    while (num_steps_ < steps && !::testing::Test::HasFatalFailure()) {
      ++num_steps_;
      switch (rig_.rng()() % 8) {
        case 0:
        case 1:
        case 2:
          guess();
          break;
        case 3:
          rig_.land_one();
          break;
        case 4:
          if (rig_.rng()() % 16 == 0) rig_.engine().drain();
          break;
        default:
          forward();
          break;
      }
      look();
    }
    rig_.failures_per_mille = 0;
    rig_.land_all();
    rig_.engine().drain();
    check_at_rest();
    coverage_.hit("policy " + policy_, num_steps_);
  }

 private:
  void guess() {
    std::vector<Hint> hints;
    for (std::uint64_t i = 1 + rig_.rng()() % 3; i > 0; --i) {
      hints.push_back({.key = make_key(static_cast<std::int32_t>(rig_.rng()() % 2),
                                       static_cast<std::int32_t>(rig_.rng()() % 8)),
                       .probability = static_cast<double>(1 + rig_.rng()() % 9) / 10});
    }
    const std::int64_t dropped = rig_.engine().stats().hints_dropped;
    rig_.engine().hint(hints);
    coverage_.hit("guess", static_cast<std::int64_t>(hints.size()));
    coverage_.hit("guess dropped", rig_.engine().stats().hints_dropped - dropped);
  }

  void forward() {
    const std::size_t idx = rig_.rng()() % calls_.size();
    const EngineStats old = rig_.engine().stats();
    const std::int64_t failures = rig_.num_failures;
    try {
      const std::vector<std::byte> out = rig_.forward(calls_[idx]);
      ASSERT_EQ(out, expected_[idx]) << "call " << idx << ", " << slots_ << " slots, " << policy_;
      coverage_.hit("forward");
    } catch (const Interrupted&) {
      coverage_.hit("interrupted");
    } catch (const std::runtime_error& error) {
      ASSERT_STREQ(error.what(), "planted failure");
      ASSERT_GT(rig_.num_failures, failures - 16);
      coverage_.hit("failed forward");
    }
    ASSERT_EQ(rig_.num_leases(), 0);
    const EngineStats now = rig_.engine().stats();
    coverage_.hit("hit", now.hits - old.hits);
    coverage_.hit("shared ticket: a demand joins a guess", now.late - old.late);
    coverage_.hit("miss", now.misses - old.misses);
    coverage_.hit("wave beyond the first", now.waves - old.waves - 1);
    coverage_.hit("eviction", now.evictions - old.evictions);
    ASSERT_EQ(now.requests, now.hits + now.late + now.misses);
  }

  /// Transitions of slots since the last look, the budget, and what a demand has overtaken.
  void look() {
    Pools pools = rig_.engine().residency();
    std::int64_t held = 0;
    for (std::size_t p = 0; p < pools.size(); ++p) {
      for (std::size_t s = 0; s < pools[p].size(); ++s) {
        const SlotCache::SlotView& was = before_[p][s];
        const SlotCache::SlotView& is = pools[p][s];
        if (is.state != SlotState::kEmpty) ++held;
        note_transition(was, is);
      }
    }
    before_ = std::move(pools);
    const EngineStats stats = rig_.engine().stats();
    ASSERT_LE(held, slots_);
    ASSERT_LE(stats.peak_resident_bytes, stats.budget_bytes);
    ASSERT_LE(stats.resident_bytes, stats.peak_resident_bytes);
    note_overtaking();
  }

  void note_transition(const SlotCache::SlotView& was, const SlotCache::SlotView& is) {
    using enum SlotState;
    if (was.state == kEmpty && is.state == kLoading) coverage_.hit("empty -> loading");
    if (was.state == kLoading && is.state == kReady && was.key == is.key)
      coverage_.hit("loading -> ready");
    if (was.state == kLoading && is.state == kEmpty) coverage_.hit("loading -> empty");
    if (was.state == kReady && is.state == kLoading) coverage_.hit("ready -> empty -> loading");
    if (is.leases > 0) coverage_.hit("leased slot");
  }

  void note_overtaking() {
    const auto waiting = rig_.link().waiting();
    bool hint = false;
    for (const ChunkCopy& copy : waiting) {
      if (copy.priority != Priority::kDemand) hint = true;
      if (copy.priority == Priority::kDemand && hint) {
        coverage_.hit("demand started beside a guess in flight");
        return;
      }
    }
  }

  void check_at_rest() {
    rig_.expect_slots_hold_their_experts();
    const EngineStats stats = rig_.engine().stats();
    EXPECT_EQ(stats.bytes_read, stats.bytes_read_demand + stats.bytes_read_hint_used +
                                    stats.bytes_read_hint_wasted + stats.bytes_read_hint_pending);
    std::uint64_t landed = 0;
    for (const ChunkCopy& copy : rig_.link().history()) landed += copy.bytes;
    EXPECT_EQ(stats.bytes_read, landed) << "every chunk that was started has landed";
    for (const auto& pool : rig_.engine().residency()) {
      for (const SlotCache::SlotView& view : pool) EXPECT_NE(view.state, SlotState::kLoading);
    }
  }

  const Model& model_;
  const std::vector<Call>& calls_;
  const std::vector<std::vector<std::byte>>& expected_;
  Coverage& coverage_;
  const std::string policy_;
  const std::int64_t slots_;
  Rig rig_;
  Pools before_;
  int num_steps_ = 0;
};

std::vector<std::string> coverage_rows() {
  std::vector<std::string> rows = {"empty -> loading",
                                   "loading -> ready",
                                   "loading -> empty",
                                   "ready -> empty -> loading",
                                   "leased slot",
                                   "guess",
                                   "guess dropped",
                                   "forward",
                                   "failed forward",
                                   "interrupted",
                                   "hit",
                                   "shared ticket: a demand joins a guess",
                                   "miss",
                                   "wave beyond the first",
                                   "eviction",
                                   "demand started beside a guess in flight"};
  for (const std::string& policy : policy_names()) rows.push_back("policy " + policy);
  return rows;
}

TEST(EngineWalk, KeepsEveryInvariantOverAHundredThousandSteps) {
  const std::uint64_t seed = test_seed();
  const ModelShape shape{.hidden = 32, .intermediate = 24};
  const Model model(shape, seed);
  std::mt19937_64 rng(seed);
  std::vector<Call> calls;
  std::vector<std::vector<std::byte>> expected;
  PlainForward plain(model);
  for (int i = 0; i < 48; ++i) {
    calls.push_back(make_call(shape, i % 2,
                              {.num_tokens = std::array{1, 1, 1, 2, 9}[i % 5],
                               .top_k = 1 + i % 4,
                               .odd_entries = i % 3 == 0},
                              rng));
    expected.push_back(plain(calls.back()));
  }
  Coverage coverage(coverage_rows());
  constexpr int kWalks = 200;
  for (int i = 0; i < kWalks && !HasFatalFailure(); ++i) {
    Walker(model, calls, expected, seed + static_cast<std::uint64_t>(i), coverage)
        .walk(kSteps / kWalks);
  }
  coverage.expect_each_at_least(kLeast, "random walk of cache, transfers and engine", seed);
}

}  // namespace
}  // namespace sluice::testing
