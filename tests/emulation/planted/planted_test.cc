// Every planted bug must die as its row says, in every order. A "-" says that it survives there,
// which is a limit of the build, and asserted so that the table in README.md stays true.

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <string>
#include <vector>

#include "tests/emulation/harness.h"
#include "tests/emulation/planted/scenarios.h"

namespace simt::planted {
namespace {

using ::testing::ContainsRegex;
using testing::kOrders;
using testing::With;

#if defined(__SANITIZE_ADDRESS__)
constexpr bool kAsan = true;
#else
constexpr bool kAsan = false;
#endif

const std::string kSurvives = "-";

/// What a run must end in: a regular expression in its report, "NaN", "wrong result" or kSurvives,
/// per order.
struct Verdict {
  Verdict(const char* always)  // NOLINT(google-explicit-constructor): a table's cell
      : forward(always), reverse(always), random(always), skew(always) {}
  Verdict(std::string f, std::string r, std::string x, std::string s)
      : forward(std::move(f)), reverse(std::move(r)), random(std::move(x)), skew(std::move(s)) {}
  [[nodiscard]] const std::string& in(Order order) const {
    switch (order) {
      case Order::kForward:
        return forward;
      case Order::kReverse:
        return reverse;
      case Order::kRandom:
        return random;
      case Order::kSkew:
        return skew;
    }
    return forward;
  }
  std::string forward, reverse, random, skew;
};

struct Planted {
  const char* name;
  std::string (*run)();
  Verdict fast;
  Verdict checked;
  /// UBSan ends the process with this; null: as `fast`.
  const char* ubsan = nullptr;
};

template <Bug kBug, bool kLastSlot = false>
std::string product() {
  return run_product(kBug, kLastSlot);
}
template <Bug kBug>
std::string warp() {
  return run_mechanism(warp_kernel(kBug));
}
template <Bug kBug>
std::string last_block() {
  return run_mechanism(last_block_kernel(kBug), Input::kDefined, 6);
}
template <Bug kBug>
std::string race() {
  return run_mechanism(race_kernel(kBug));
}
template <Bug kBug>
std::string stages() {
  return run_mechanism(stages_kernel(kBug));
}
template <Bug kBug>
std::string memory() {
  return run_mechanism(memory_kernel(kBug));
}
template <Input kInput>
std::string reading() {
  return run_mechanism(reading_kernel(), kInput);
}
template <Input kTarget>
std::string writing() {
  return run_writing(kTarget);
}
std::string waiting() { return run_mechanism(waiting_kernel()); }
std::string half_warps() { return run_mechanism(half_warps_kernel()); }
std::string write_after_foreign_read() {
  return run_mechanism(write_after_foreign_read_kernel(), Input::kDefined, 2);
}
std::string unordered() { return run_mechanism(unordered_blocks_kernel(), Input::kDefined, 2); }

const Planted kPlanted[] = {
    // Fragments, staging, barriers.
    {"FragmentsExchanged", product<Bug::kFragmentsExchanged>, "wrong result", "wrong result"},
    {"StagedIndexHalved", product<Bug::kStagedIndexHalved>, "wrong result", "wrong result",
     "misaligned address"},
    {"NoBarrierAfterPartials",
     product<Bug::kNoBarrierAfterPartials>,
     {"NaN", "-", "NaN", "NaN"},
     "shared memory race.*|uninitialised shared memory: .* shared partial"},
    {"NoBarrierAtLoopEnd",
     product<Bug::kNoBarrierAtLoopEnd>,
     {"-", "-", "-", "wrong result"},
     "shared memory race: this thread (reads|writes) shared partial.*thread [0-9]+ has"},
    {"NoBarrierAfterStaging", product<Bug::kNoBarrierAfterStaging>, "NaN",
     "uninitialised shared memory: this thread reads shared \\(dynamic\\)"},
    {"NoCopyWait", product<Bug::kNoCopyWait>, "exits with cp.async in flight.*product.cu",
     "uninitialised shared memory"},
    {"NoDependencyWait", product<Bug::kNoDependencyWait>, "NaN",
     "uninitialised memory: this thread reads device x"},
    // Bounds.
    {"ReadsPastTheRow", product<Bug::kReadsPastTheRow, true>,
     "fault: this thread touches device slab.131[0-9]+ of 131072 bytes \\(past the end\\)",
     "out of bounds: this thread reads 16 bytes at device slab.131[0-9]+ of 131072 bytes"},
    {"ReadsPastTheRowOfAnInnerSlot", product<Bug::kReadsPastTheRow>, "wrong result",
     "forbidden bytes: this thread reads 16 bytes at device slab.655[0-9]+"},
    {"WritesARowTooMany", product<Bug::kWritesARowTooMany>,
     "fault: this thread touches device y.2[56][0-9]+ of 2560 bytes \\(past the end\\)",
     "out of bounds: this thread writes 4 bytes at device y.2[56][0-9]+ of 2560 bytes"},
    {"ReadsTheNeighbourSlot", product<Bug::kReadsTheNeighbourSlot>, "-",
     "forbidden bytes: this thread reads 16 bytes at device slab.65536"},
    {"EndsEarly", reading<Input::kEndsEarly>, "wrong result",
     "out of bounds: this thread reads 4 bytes at device in.252 of 252 bytes \\(past the end\\)"},
    {"EndsAtAGap", reading<Input::kEndsAtGap>, "-",
     "forbidden bytes: this thread reads 4 bytes at device in.252"},
    // Divergence: both places are named.
    {"LaneSkipsMma", product<Bug::kLaneSkipsMma>,
     "warp divergence: .*product.cu:4[0-9], lane [0-9]+ waits in mma at .*product.cu:4[0-9] ",
     "warp divergence: .*product.cu:4[0-9], lane [0-9]+ waits in mma at .*product.cu:4[0-9] "},
    {"BarrierInOneWarp", product<Bug::kBarrierInOneWarp>,
     "barrier divergence: .*product.cu:[0-9]+, thread [0-9]+ waits at .*product.cu:[0-9]+;",
     "barrier divergence|shared memory race"},
    {"ShuffleNamesAnExitedLane", warp<Bug::kShuffleNamesAnExitedLane>, "lane 5", "lane 5"},
    {"ShuffleReadsOutsideItsMask", warp<Bug::kShuffleReadsOutsideItsMask>,
     "which is not in the mask|with another mask", "which is not in the mask|with another mask"},
    {"MasksDiffer", warp<Bug::kMasksDiffer>, "with another mask", "with another mask"},
    {"ExitsBeforeACollective", warp<Bug::kExitsBeforeACollective>, "lane 31.* exit",
     "lane 31.* exit"},
    // Order between threads.
    {"NoSyncwarp", warp<Bug::kNoSyncwarp>, "wrong result",
     "uninitialised shared memory|shared memory race"},
    {"PlainCounter", last_block<Bug::kPlainCounter>, "-",
     "global memory race: this thread reads device counter"},
    {"NoFence", last_block<Bug::kNoFence>, "-",
     "global memory race: this thread reads device scratch.*block [0-9] has written it"},
    // A fence covers all that its block has written by then: in reverse thread 0 comes last.
    {"FenceBeforeTheBarrier",
     last_block<Bug::kFenceBeforeTheBarrier>,
     "-",
     {"global memory race", "-", "global memory race", "global memory race"}},
    {"UnorderedBlocks",
     unordered,
     {"-", "wrong result", "wrong result", "-"},
     "global memory race|uninitialised memory"},
    {"WriteAfterForeignRead", write_after_foreign_read, "-",
     "global memory race: .*block [01] has (read|written) it"},
    {"AnotherWarpHasRead",
     race<Bug::kAnotherWarpHasRead>,
     "-",
     {"shared memory race: this thread writes shared word.0 .*warp 0 has read it",
      "shared memory race", "shared memory race", "shared memory race"}},
    {"AnotherLaneHasRead", race<Bug::kAnotherLaneHasRead>, "-",
     "shared memory race: this thread writes shared word.0 .*(thread [0-9]+|another lane of warp "
     "0) has read it"},
    {"PlainReadBesideAtomics", race<Bug::kPlainReadBesideAtomics>, "-",
     "shared memory race: this thread (reads|writes) shared count"},
    {"NoBarrierBeforeRefill",
     stages<Bug::kNoBarrierBeforeRefill>,
     {"wrong result", "-", "wrong result", "wrong result"},
     "shared memory race|uninitialised shared memory"},
    {"WaitsForTooFew", stages<Bug::kWaitsForTooFew>, "wrong result",
     "uninitialised shared memory: this thread reads shared buffer"},
    // Memory of the wrong kind.
    {"Undefined", reading<Input::kUndefined>, "wrong result",
     "uninitialised memory: this thread reads device in"},
    {"Freed", reading<Input::kFreed>, "fault: this thread touches device in.*bytes \\(freed\\)",
     "use after free: this thread reads 4 bytes at device in"},
    {"ReadsTheHeap", reading<Input::kHeap>, "-", "host memory: this thread reads 0x"},
    {"ReadsBss", reading<Input::kBss>, "-", "host memory: this thread reads 0x"},
    {"ReadsNearNull", reading<Input::kNearNull>, "fault: this thread touches ",
     "host memory: this thread reads "},
    {"OtherDevice", reading<Input::kOtherDevice>, "-", "of device 0, its kernel runs on device 1"},
    {"WritesTheHeap", writing<Input::kHeap>, "-", "host memory: this thread writes 0x"},
    {"WritesBss", writing<Input::kBss>, "-", "host memory: this thread writes 0x"},
    {"WritesConstants", writing<Input::kConstants>, "fault: this thread touches 0x",
     "host memory: this thread writes 0x"},
    // Shared memory, stack, alignment, progress.
    {"PastStaticShared", memory<Bug::kPastStaticShared>, "-",
     "out of bounds: this thread writes 4 bytes at shared fixed.256 of 256 bytes",
     "index 64 out of bounds"},
    {"PastDynamicShared", memory<Bug::kPastDynamicShared>,
     "fault: this thread touches shared \\(dynamic\\).256 of 256 bytes",
     "out of bounds: this thread writes 4 bytes at shared \\(dynamic\\).256 of 256 bytes"},
    {"StaticSharedTooLarge", memory<Bug::kStaticSharedTooLarge>,
     "static shared memory: got 49156 bytes with fixed, expected at most 49152",
     "static shared memory: got 49156 bytes with fixed, expected at most 49152"},
    {"StackOverflow", memory<Bug::kStackOverflow>, "its stack: it overflowed",
     "its stack: it overflowed"},
    {"MisalignedStream", memory<Bug::kMisalignedStream>,
     "load_stream: got device in.[0-9]+ of 256 bytes, expected an address aligned to 16 bytes",
     "load_stream: got device in.[0-9]+ of 256 bytes, expected an address aligned to 16 bytes"},
    {"MisalignedMatrix", memory<Bug::kMisalignedMatrix>,
     "ldmatrix: got shared rows.530 of 1024 bytes, expected an address aligned to 16 bytes",
     "ldmatrix: got shared rows.530 of 1024 bytes, expected an address aligned to 16 bytes"},
    {"NarrowedMisalignedLoad", memory<Bug::kNarrowedMisalignedLoad>, "-", "-",
     "misaligned address"},
    {"NobodyAnswers", waiting, "spins", "spins"},
};

void PrintTo(const Planted& bug, std::ostream* out) { *out << bug.name; }

class Planting : public ::testing::TestWithParam<Planted> {};
INSTANTIATE_TEST_SUITE_P(Bugs, Planting, ::testing::ValuesIn(kPlanted),
                         [](const auto& bug) { return std::string(bug.param.name); });

TEST_P(Planting, DiesAsItsRowSays) {
  const Planted& bug = GetParam();
  for (const Order order : kOrders) {
    SCOPED_TRACE(testing::name_of(order));
    const With with({.order = order, .seed = 1});
    if (kAsan && bug.ubsan != nullptr) {
      EXPECT_DEATH((void)bug.run(), bug.ubsan);
      continue;
    }
    const std::string end = bug.run();
    const std::string& expected = (checked() ? bug.checked : bug.fast).in(order);
    if (expected == kSurvives) {
      EXPECT_EQ(end, "");
    } else {
      EXPECT_THAT(end, ContainsRegex(expected));
    }
  }
}

// The control: what the bugs are planted in is right, in every order and under more seeds.
TEST(Planting, ControlsAreClean) {
  for (const Order order : kOrders) {
    for (const std::uint64_t seed : {1, 2, 3, 4, 5}) {
      SCOPED_TRACE(testing::name_of(order));
      const With with({.order = order, .seed = seed, .late_cp_async = seed % 2 == 1});
      EXPECT_EQ(product<Bug::kNone>(), "");
      EXPECT_EQ((product<Bug::kNone, true>()), "");
      EXPECT_EQ(warp<Bug::kNone>(), "");
      EXPECT_EQ(last_block<Bug::kNone>(), "");
      EXPECT_EQ(race<Bug::kNone>(), "");
      EXPECT_EQ(stages<Bug::kNone>(), "");
      EXPECT_EQ(half_warps(), "");
      EXPECT_EQ(memory<Bug::kNone>(), "");
      EXPECT_EQ(reading<Input::kDefined>(), "");
      EXPECT_EQ(reading<Input::kConstants>(), "");
      EXPECT_EQ(writing<Input::kDefined>(), "");
    }
  }
}

}  // namespace
}  // namespace simt::planted
