// A launch and its steps.

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <memory>
#include <thread>
#include <vector>

#include "tests/emulation/harness.h"
#include "tests/emulation/simt_test_kernels.h"

namespace simt::testing {
namespace {

using ::testing::HasSubstr;
using ::testing::StartsWith;

TEST(Grid, StepsByBatchesOfResidentBlocks) {
  const With with({.resident = 3});
  Array<Where> out(7 * 32);
  const auto grid = make_grid("positions", {.grid = 7}, positions_kernel, out.data());
  EXPECT_EQ(grid->step(), Grid::Step::kProgress);
  EXPECT_EQ(out[2 * 32].block.x, 2u);
  EXPECT_EQ(out[3 * 32].block.x, 0xFFFFFFFFu) << "of the next batch";
  EXPECT_EQ(grid->step(), Grid::Step::kProgress);
  EXPECT_EQ(grid->step(), Grid::Step::kDone);
  EXPECT_EQ(out[6 * 32].block.x, 6u);
}

TEST(Grid, RunsAheadOfItsDependencyUpToTheWait) {
  Array<int> previous(32), prologue(32), out(32);
  const auto grid =
      make_grid("dependent", {}, dependent_kernel, previous.data(), prologue.data(), out.data());
  grid->set_dependency_done(false);
  EXPECT_EQ(grid->step(), Grid::Step::kBlockedOnDependency);
  EXPECT_EQ(prologue[31], 1);
  EXPECT_EQ(out[31], -1) << "behind the wait";
  EXPECT_EQ(grid->step(), Grid::Step::kBlockedOnDependency);
  previous.fill(41);
  grid->set_dependency_done(true);
  EXPECT_EQ(grid->step(), Grid::Step::kDone);
  EXPECT_EQ(out[0], 42);
}

TEST(Grid, DoesNotWaitForADependencyThatIsDone) {
  Array<int> previous(32), prologue(32), out(32);
  previous.fill(1);
  EXPECT_EQ(run("dependent", {}, dependent_kernel, previous.data(), prologue.data(), out.data()),
            "");
  EXPECT_EQ(out[0], 2);
}

class GridInEveryOrder : public ::testing::TestWithParam<Order> {};
INSTANTIATE_TEST_SUITE_P(Grid, GridInEveryOrder, ::testing::ValuesIn(kOrders),
                         [](const auto& order) { return std::string(name_of(order.param)); });

/// A grid that posts 7 and waits for the host to answer 8.
struct Asking {
  Asking() {
    posted.fill(0);
    served.fill(0);
  }
  Array<std::uint32_t> posted{1, "posted", RegionKind::kPinned};
  Array<std::uint32_t> served{1, "served", RegionKind::kPinned};
  Array<int> out{64};
  std::unique_ptr<Grid> grid =
      make_grid("answer", {.block = 64}, answer_kernel, posted.data(),
                static_cast<const std::uint32_t*>(served.data()), out.data());
};

TEST_P(GridInEveryOrder, SaysThatItSpinsUntilTheHostAnswers) {
  const With with({.order = GetParam()});
  Asking asking;
  EXPECT_EQ(asking.grid->step(), Grid::Step::kProgress) << "it has posted";
  EXPECT_EQ(asking.posted[0], 7u);
  EXPECT_EQ(asking.grid->step(), Grid::Step::kSpinning);
  EXPECT_EQ(asking.grid->step(), Grid::Step::kSpinning);
  asking.served[0] = 8;
  EXPECT_EQ(asking.grid->step(), Grid::Step::kDone);
  EXPECT_EQ(asking.out[63], 1);
}

TEST(Grid, SaysThatABlockSpinsForOneThatIsNotResident) {
  for (const Order order : {Order::kForward, Order::kReverse}) {
    const With with({.order = order, .resident = 1});
    Array<std::uint32_t> turns(9);
    Array<int> out(9);
    turns.fill(0);
    turns[0] = 1;
    out.fill(0);
    const std::string end =
        run("in_turn", {.grid = 8}, blocks_in_turn_kernel, turns.data(), out.data());
    EXPECT_EQ(end, order == Order::kForward ? "" : "spins");
  }
}

TEST_P(GridInEveryOrder, MayBeDroppedAtAnyMoment) {
  const With with({.order = GetParam()});
  Array<std::uint32_t> turns(9);
  Array<int> out(9);
  turns.fill(0);
  out.fill(0);
  for (int i = 0; i < 3; ++i) {
    const auto grid =
        make_grid("in_turn", {.grid = 8}, blocks_in_turn_kernel, turns.data(), out.data());
    for (int step = 0; step < i; ++step) (void)grid->step();
  }
  Array<int> in(256), shifted(256);
  in.fill(4);
  EXPECT_EQ(run("shift", {.block = 256}, shift_kernel, in.data(), shifted.data()), "");
}

// The order in which threads reach an atomic is the schedule.
std::vector<unsigned> schedule(Order order, std::uint64_t seed) {
  const With with({.order = order, .seed = seed});
  Array<unsigned> slots(65);
  slots.fill(0);
  EXPECT_EQ(run("arrival", {.grid = 2}, arrival_kernel, slots.data()), "");
  return {slots.data() + 1, slots.data() + 65};
}

TEST_P(GridInEveryOrder, RepeatsItselfUnderTheSameSeed) {
  EXPECT_EQ(schedule(GetParam(), 11), schedule(GetParam(), 11));
}

TEST(Grid, RunsInDifferentOrders) {
  EXPECT_NE(schedule(Order::kRandom, 1), schedule(Order::kRandom, 2));
  const auto forward = schedule(Order::kForward, 1);
  auto reverse = schedule(Order::kReverse, 1);
  EXPECT_TRUE(std::is_sorted(forward.begin(), forward.end()));
  std::reverse(reverse.begin(), reverse.end());
  EXPECT_EQ(forward, reverse);
}

TEST(Grid, LetsOneWarpRunAsFarAsItCanUnderSkew) {
  for (const std::uint64_t seed : {1, 2, 3}) {
    const With with({.order = Order::kSkew, .seed = seed});
    Array<unsigned> slots(1 + 3 * 8);
    slots.fill(0);
    ASSERT_EQ(run("rounds", {.grid = 2, .block = 128}, rounds_kernel, slots.data()), "");
    for (std::size_t i = 0; i < 24; i += 3) {
      EXPECT_EQ(slots[1 + i], slots[2 + i]);
      EXPECT_EQ(slots[1 + i], slots[3 + i]);
    }
  }
}

TEST(Grid, MayBeSteppedByAnyThread) {
  const With with({.resident = 1});
  Asking asking;
  EXPECT_EQ(asking.grid->step(), Grid::Step::kProgress);
  asking.served[0] = 8;
  std::thread([&] { EXPECT_EQ(asking.grid->step(), Grid::Step::kDone); }).join();
  EXPECT_EQ(asking.out[0], 1);
}

TEST(Grid, RefusesShapesThatNoGpuRuns) {
  Array<int> out(1);
  const auto error = [&](Shape shape) { return run("k", shape, exit_early_kernel, out.data(), 0); };
  EXPECT_EQ(error({.block = dim3(32, 33)}),
            "k: launch: got 1056 threads per block, expected 1 to 1024");
  EXPECT_EQ(error({.block = 0}), "k: launch: got 0 threads per block, expected 1 to 1024");
  EXPECT_THAT(error({.grid = dim3(4, 0)}), HasSubstr("got 0 blocks, expected 1 to 2^31 - 1"));
  EXPECT_THAT(error({.shared_bytes = (227 << 10) + 1}),
              HasSubstr("got 232449 bytes of dynamic shared memory, expected at most 232448"));
  EXPECT_EQ(error({.block = 1024, .shared_bytes = 227 << 10}), "");
}

TEST(Grid, StaysFailed) {
  Array<int> freed(4);
  freed.free();
  const auto grid = make_grid("touch", {}, touch_kernel, freed.data(), 0L, true);
  EXPECT_EQ(grid->step(), Grid::Step::kFailed);
  const std::string error = grid->error();
  EXPECT_THAT(error, StartsWith("touch block (0,0,0) thread 0: "));
  EXPECT_EQ(grid->step(), Grid::Step::kFailed);
  EXPECT_EQ(grid->error(), error);
}

TEST(Grid, CountsWhatItDoes) {
  counters() = {};
  Array<int> in(256), out(256);
  in.fill(0);
  ASSERT_EQ(run("shift", {.block = 256}, shift_kernel, in.data(), out.data()), "");
  EXPECT_EQ(counters().barriers, 10u);
  EXPECT_EQ(counters().switches, 256u * 11);
  EXPECT_EQ(counters().mma, 0u);
  if (checked()) {
    EXPECT_EQ(counters().checked_accesses, 256u * (1 + 10 + 1));
  } else {
    EXPECT_EQ(counters().checked_accesses, 0u);
  }
}

}  // namespace
}  // namespace simt::testing
