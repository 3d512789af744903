// Threads of a block and what they do together.

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <vector>

#include "tests/emulation/harness.h"
#include "tests/emulation/simt_test_kernels.h"

namespace simt::testing {
namespace {

class SimtInEveryOrder : public ::testing::TestWithParam<Order> {
 protected:
  const With with_{{.order = GetParam(), .seed = 3}};
};
INSTANTIATE_TEST_SUITE_P(Simt, SimtInEveryOrder, ::testing::ValuesIn(kOrders),
                         [](const auto& order) { return std::string(name_of(order.param)); });

TEST_P(SimtInEveryOrder, GivesEachThreadItsPosition) {
  const dim3 grid(3, 2, 2), block(5, 4, 3);
  Array<Where> out(3 * 2 * 2 * 5 * 4 * 3);
  ASSERT_EQ(run("positions", {.grid = grid, .block = block}, positions_kernel, out.data()), "");
  std::size_t i = 0;
  for (unsigned b = 0; b < 12; ++b) {
    for (unsigned t = 0; t < 60; ++t, ++i) {
      EXPECT_EQ(out[i].block.x, b % 3);
      EXPECT_EQ(out[i].block.y, b / 3 % 2);
      EXPECT_EQ(out[i].block.z, b / 6);
      EXPECT_EQ(out[i].thread.x, t % 5);
      EXPECT_EQ(out[i].thread.y, t / 5 % 4);
      EXPECT_EQ(out[i].thread.z, t / 20);
      EXPECT_EQ(out[i].grid_dim.y, 2u);
      EXPECT_EQ(out[i].block_dim.z, 3u);
    }
  }
}

TEST_P(SimtInEveryOrder, MovesValuesThroughSharedMemory) {
  Array<int> in(256), out(256);
  in.generate([](std::size_t i) { return i * 3; });
  ASSERT_EQ(run("shift", {.block = 256}, shift_kernel, in.data(), out.data()), "");
  for (int i = 0; i < 256; ++i) EXPECT_EQ(out[i], (i + 5) % 256 * 3);
}

TEST_P(SimtInEveryOrder, ReducesAtABarrier) {
  for (const int ones : {0, 1, 99, 100}) {
    Array<int> in(100), out(100);
    in.generate([&](std::size_t i) { return static_cast<int>(i) < ones ? 5 : 0; });
    ASSERT_EQ(run("reduce", {.block = 100}, reduce_kernel, in.data(), out.data()), "");
    const int expected = ones * 4 + (ones == 100 ? 2 : 0) + (ones > 0 ? 1 : 0);
    for (int i = 0; i < 100; ++i) EXPECT_EQ(out[i], expected);
  }
}

TEST_P(SimtInEveryOrder, LetsThreadsLeaveBeforeABarrier) {
  Array<int> out(100);
  ASSERT_EQ(run("exit_early", {.block = 100}, exit_early_kernel, out.data(), 40), "");
  for (int i = 0; i < 40; ++i) EXPECT_EQ(out[i], 40);
}

// What the PTX manual's table for shfl.sync says, written again.
int expected_source(int kind, int lane, int argument, int width) {
  const int segment = lane / width * width;
  switch (kind) {
    case 0:
      return segment + argument % width;
    case 1:
      return lane - argument < segment ? lane : lane - argument;
    case 2:
      return lane + argument >= segment + width ? lane : lane + argument;
    default:
      return (lane ^ argument) >= segment + width ? lane : lane ^ argument;
  }
}

TEST_P(SimtInEveryOrder, ShufflesWithinSegments) {
  for (const int width : {1, 2, 8, 16, 32}) {
    for (const int argument : {0, 1, 3, 7, 16, 31}) {
      for (int kind = 0; kind < 4; ++kind) {
        Array<int> out(32);
        ASSERT_EQ(run("shuffle", {}, shuffle_kernel, kind, argument, width, out.data()), "");
        for (int lane = 0; lane < 32; ++lane) {
          const int source = expected_source(kind, lane, argument, width);
          // xor may point below the segment, which is legal and gives that lane's value: none does
          // here with the widths above, because a mask past the width leaves the segment upwards
          // for its lower half and downwards for the upper.
          if (source < lane / width * width) continue;
          EXPECT_EQ(out[lane], 100 + source) << "kind " << kind << " lane " << lane << " argument "
                                             << argument << " width " << width;
        }
      }
    }
  }
}

TEST_P(SimtInEveryOrder, LetsHalvesOfAWarpMeetApart) {
  Array<int> out(32);
  ASSERT_EQ(run("half_warps", {}, half_warps_kernel, out.data()), "");
  for (int lane = 0; lane < 32; ++lane) EXPECT_EQ(out[lane], lane ^ (lane < 16 ? 1 : 2));
}

TEST_P(SimtInEveryOrder, Votes) {
  for (const int below : {0, 1, 31, 32}) {
    Array<unsigned> out(64);
    ASSERT_EQ(run("vote", {}, vote_kernel, below, out.data()), "");
    const unsigned ballot = below == 32 ? ~0u : (1u << below) - 1;
    for (int lane = 0; lane < 32; ++lane) {
      EXPECT_EQ(out[lane], ballot);
      EXPECT_EQ(out[lane + 32], (below > 0 ? 2u : 0u) + (below == 32 ? 1u : 0u));
    }
  }
}

TEST_P(SimtInEveryOrder, UpdatesAtomically) {
  Array<unsigned> out(8);
  out.fill(0);
  out[2] = out[4] = ~0u;
  out[5] = 1000;
  ASSERT_EQ(run("atomics", {.grid = 5, .block = 64}, atomics_kernel, out.data()), "");
  EXPECT_EQ(out[0], 320u);
  EXPECT_EQ(out[1], 319u);
  EXPECT_EQ(out[2], 0u);
  EXPECT_EQ(out[3], ~0u);
  EXPECT_EQ(out[4], 0u);
  EXPECT_EQ(out[5], 680u);
  EXPECT_EQ(out[6], 640u);
}

TEST_P(SimtInEveryOrder, RunsTheLastBlockOnWhatAllHaveWritten) {
  Array<float> partials(6 * 64), out(64);
  Array<unsigned> counter(1);
  counter.fill(0);
  ASSERT_EQ(run("last_block", {.grid = 6, .block = 64}, last_block_kernel, partials.data(),
                counter.data(), out.data()),
            "");
  for (int i = 0; i < 64; ++i) EXPECT_EQ(out[i], 21.0f);
}

TEST_P(SimtInEveryOrder, LetsBlocksWaitForEachOtherWhileTheyAreResident) {
  const With with({.order = GetParam(), .seed = 5, .resident = 8});
  Array<std::uint32_t> turns(9);
  Array<int> out(9);
  turns.fill(0);
  turns[0] = 1;
  out.fill(0);
  ASSERT_EQ(run("in_turn", {.grid = 8}, blocks_in_turn_kernel, turns.data(), out.data()), "");
  std::vector<int> expected(9, 0);
  for (std::size_t b = 0; b < 8; ++b) expected[b + 1] = expected[b] + expected[b / 2] + 1;
  for (std::size_t b = 0; b < 9; ++b) EXPECT_EQ(out[b], expected[b]);
}

TEST_P(SimtInEveryOrder, DoesNotMistakeNeighboursForRaces) {
  Array<unsigned char> out(64 * 4);
  ASSERT_EQ(run("mixed_bytes", {.grid = 4, .block = 64}, mixed_bytes_kernel, out.data()), "");
  for (int i = 0; i < 256; ++i) EXPECT_EQ(out[i], 63 - i / 4);
}

TEST_P(SimtInEveryOrder, SeesStoresOfStructs) {
  Array<float> in(64);
  Array<__nv_bfloat16> out(64);
  in.generate([](std::size_t i) { return i; });
  ASSERT_EQ(run("narrow_store", {.block = 64}, narrow_store_kernel, in.data(), out.data()), "");
  for (int i = 0; i < 64; ++i) EXPECT_EQ(static_cast<float>(out[i]), i ^ 1);
}

TEST_P(SimtInEveryOrder, OrdersOneGridAfterAnother) {
  Array<int> first(128), second(128), third(128);
  first.generate([](std::size_t i) { return i; });
  ASSERT_EQ(run("reversed", {.grid = 4}, reversed_kernel, first.data(), second.data()), "");
  ASSERT_EQ(run("reversed", {.grid = 4}, reversed_kernel, second.data(), third.data()), "");
  for (int i = 0; i < 128; ++i) EXPECT_EQ(third[i], i);
}

TEST_P(SimtInEveryOrder, KeepsPublishedBytesApartFromLaterOnes) {
  Array<std::uint16_t> halves(2);
  Array<std::uint32_t> flag(1);
  Array<int> out(1);
  flag.fill(0);
  ASSERT_EQ(
      run("half_words", {.grid = 2}, half_words_kernel, halves.data(), flag.data(), out.data()),
      "");
  EXPECT_EQ(out[0], 7);
}

TEST_P(SimtInEveryOrder, BelievesBytesThatHoldNoPoison) {
  Array<__nv_bfloat16> memory(32);
  Array<float> out(32);
  ASSERT_EQ(run("escaping", {}, escaping_stores_kernel, memory.data(), out.data()), "");
  EXPECT_EQ(out[31], 4.0f);
}

TEST(Simt, LetsKernelsReadConstants) {
  Array<int> out(32);
  ASSERT_EQ(run("constants", {}, constants_kernel, out.data()), "");
  EXPECT_EQ(out[5], 9);
}

TEST(Simt, LetsKernelsReadAndWritePinnedMemory) {
  Array<int> pinned(4, "mailbox", RegionKind::kPinned);
  pinned.fill(0);
  ASSERT_EQ(run("touch", {}, touch_kernel, pinned.data(), 3L, true), "");
  EXPECT_EQ(pinned[3], 1);
}

}  // namespace
}  // namespace simt::testing
