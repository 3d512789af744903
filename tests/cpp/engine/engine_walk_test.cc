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
    for (const Hint& hint : hints) {
      const std::optional<SlotState> state = state_of(hint.key);
      const std::int64_t dropped = rig_.engine().stats().hints_dropped;
      rig_.engine().hint({&hint, 1});
      coverage_.hit("guess");
      if (rig_.engine().stats().hints_dropped == dropped) continue;
      if (state == SlotState::kReady) coverage_.hit("guess refused: resident");
      if (state == SlotState::kLoading) coverage_.hit("guess refused: on its way");
      if (!state) coverage_.hit("guess refused: declined, or not among the best");
    }
  }

  [[nodiscard]] std::optional<SlotState> state_of(ExpertKey key) {
    for (const auto& pool : rig_.engine().residency())
      for (const SlotCache::SlotView& view : pool)
        if (view.state != SlotState::kEmpty && view.key == key) return view.state;
    return std::nullopt;
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
    std::int64_t taken = 0;
    for (std::size_t p = 0; p < pools.size(); ++p) {
      for (std::size_t s = 0; s < pools[p].size(); ++s) {
        const SlotCache::SlotView& was = before_[p][s];
        const SlotCache::SlotView& is = pools[p][s];
        if (is.state != SlotState::kEmpty) ++held;
        if (is.state == SlotState::kLoading || is.leases > 0) ++taken;
        note_transition(was, is);
      }
    }
    before_ = std::move(pools);
    failures_before_ = rig_.num_failures;
    if (taken == slots_) coverage_.hit("refusal: every slot is leased or loading");
    const EngineStats stats = rig_.engine().stats();
    ASSERT_LE(held, slots_);
    ASSERT_LE(stats.peak_resident_bytes, stats.budget_bytes);
    ASSERT_LE(stats.resident_bytes, stats.peak_resident_bytes);
  }

  void note_transition(const SlotCache::SlotView& was, const SlotCache::SlotView& is) {
    using enum SlotState;
    if (was.state == kEmpty && is.state == kLoading) coverage_.hit("empty -> loading");
    if (was.state == kLoading && is.state == kReady && was.key == is.key)
      coverage_.hit("loading -> ready");
    if (was.state == kLoading && is.state == kEmpty) {
      const bool failed = rig_.num_failures != failures_before_;
      coverage_.hit(failed ? "loading -> empty: failed" : "loading -> empty: cancelled");
    }
    if (was.state == kReady && is.state == kLoading) coverage_.hit("ready -> empty -> loading");
    if (is.leases > 0) coverage_.hit("leased slot");
  }

  /// A guess had begun, a demand's chunk was started, then the guess went on.
  void note_overtaking() {
    std::map<ExpertKey, bool> begun;  // guesses under way; true: overtaken
    for (const ChunkCopy& copy : rig_.link().history()) {
      if (copy.priority == Priority::kDemand) {
        begun.erase(copy.key);
        for (auto& [key, overtaken] : begun) overtaken = true;
        continue;
      }
      const auto guess = begun.find(copy.key);
      if (copy.chunk > 0 && guess != begun.end() && guess->second) {
        coverage_.hit("demand overtakes a guess");
      }
      begun[copy.key] = false;
    }
  }

  void check_at_rest() {
    note_overtaking();
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
  std::int64_t failures_before_ = 0;
  int num_steps_ = 0;
};

std::vector<std::string> coverage_rows() {
  std::vector<std::string> rows = {"empty -> loading",
                                   "loading -> ready",
                                   "loading -> empty: failed",
                                   "loading -> empty: cancelled",
                                   "ready -> empty -> loading",
                                   "leased slot",
                                   "guess",
                                   "guess refused: resident",
                                   "guess refused: on its way",
                                   "guess refused: declined, or not among the best",
                                   "refusal: every slot is leased or loading",
                                   "forward",
                                   "failed forward",
                                   "interrupted",
                                   "hit",
                                   "shared ticket: a demand joins a guess",
                                   "miss",
                                   "wave beyond the first",
                                   "eviction",
                                   "demand overtakes a guess"};
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
                              {.num_tokens = std::array{1, 1, 1, 2, 33}[i % 5],
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
