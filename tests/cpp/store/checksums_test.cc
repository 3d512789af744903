#include "store/checksums.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <random>
#include <thread>
#include <vector>

#include "base/crc32c.h"
#include "store/temp_folder.h"

namespace sluice {
namespace {

using Verdict = Checksums::Verdict;

// One expert in `num_chunks` chunks, its right values, and wrong ones.
struct Subject {
  std::vector<ReadChunk> chunks;
  std::vector<std::uint32_t> right;
  std::uint32_t whole = 0;
  explicit Subject(std::size_t num_chunks) {
    for (std::size_t i = 0; i < num_chunks; ++i) {
      const auto bytes = testing::pattern(100 + i, i);
      ReadChunk chunk;
      chunk.bytes = static_cast<std::uint32_t>(bytes.size());
      chunks.push_back(chunk);
      right.push_back(crc32c(bytes));
      whole = i == 0 ? right[0] : crc32c_combine(whole, right[i], chunk.bytes);
    }
  }
};

// Checksums of `experts` copies of one expert.
Checksums make_checksums(Verify verify, const Subject& subject, std::size_t experts = 1) {
  const std::vector<std::int32_t> num_chunks(experts,
                                             static_cast<std::int32_t>(subject.chunks.size()));
  return {verify, std::vector<std::uint32_t>(experts, subject.whole), num_chunks};
}

const std::byte* slot(std::size_t i) { return reinterpret_cast<const std::byte*>((i + 1) * 4096); }

TEST(Checksums, ProveAnExpertOnceThenRestWhenAskedForTheFirstReadAlone) {
  const Subject subject(3);
  Checksums first = make_checksums(Verify::kFirst, subject);
  Checksums always = make_checksums(Verify::kAlways, subject);
  EXPECT_FALSE(make_checksums(Verify::kOff, subject).due(0));
  for (Checksums* checksums : {&first, &always}) {
    for (const std::size_t chunk : {2u, 0u, 1u}) {
      EXPECT_TRUE(checksums->due(0));
      EXPECT_EQ(checksums->accept(0, subject.chunks, chunk, subject.right[chunk], slot(0)),
                Verdict::kGood);
    }
  }
  EXPECT_FALSE(first.due(0));
  EXPECT_TRUE(always.due(0));
  EXPECT_EQ(always.accept(0, subject.chunks, 1, subject.right[1] ^ 1, slot(1)), Verdict::kMismatch);
  EXPECT_EQ(always.accept(0, subject.chunks, 1, subject.right[1], slot(1)), Verdict::kGood);
}

TEST(Checksums, RefuseAWrongLoadAndTakeTheNextRightOne) {
  const Subject subject(2);
  Checksums checksums = make_checksums(Verify::kFirst, subject);
  EXPECT_EQ(checksums.accept(0, subject.chunks, 0, 7, slot(0)), Verdict::kGood);
  EXPECT_EQ(checksums.accept(0, subject.chunks, 1, subject.right[1], slot(0)), Verdict::kMismatch);
  EXPECT_TRUE(checksums.due(0));
  EXPECT_EQ(checksums.accept(0, subject.chunks, 0, subject.right[0], slot(0)), Verdict::kGood);
  EXPECT_EQ(checksums.accept(0, subject.chunks, 1, subject.right[1], slot(0)), Verdict::kGood);
  EXPECT_FALSE(checksums.due(0));
}

TEST(Checksums, ProveARevivedLoadByAllItsChunks) {
  const Subject subject(4);
  Checksums checksums = make_checksums(Verify::kFirst, subject);
  for (const std::size_t chunk : {0u, 1u}) {
    (void)checksums.accept(0, subject.chunks, chunk, subject.right[chunk], slot(0));
  }
  // cancelled; asked for again before its slot was given away: it goes on where it was
  EXPECT_EQ(checksums.accept(0, subject.chunks, 2, subject.right[2], slot(0)), Verdict::kGood);
  EXPECT_TRUE(checksums.due(0));
  EXPECT_EQ(checksums.accept(0, subject.chunks, 3, subject.right[3], slot(0)), Verdict::kGood);
  EXPECT_FALSE(checksums.due(0));
}

TEST(Checksums, StopALoadThatTookAWrongChunkBeforeAnotherProvedTheExpert) {
  const Subject subject(3);
  Checksums checksums = make_checksums(Verify::kFirst, subject);
  EXPECT_EQ(checksums.accept(0, subject.chunks, 0, 7, slot(1)), Verdict::kGood) << "not known yet";
  for (std::size_t chunk = 0; chunk < 3; ++chunk) {
    (void)checksums.accept(0, subject.chunks, chunk, subject.right[chunk], slot(0));
  }
  EXPECT_TRUE(checksums.due(0)) << "a suspect is still under way";
  EXPECT_EQ(checksums.accept(0, subject.chunks, 1, subject.right[1], slot(1)), Verdict::kMismatch);
  EXPECT_FALSE(checksums.due(0));
}

// Loads of two experts into a few slots by an adversary: chunks in any order, wrong values, loads
// dropped and begun anew in the same slot. Whatever happens, a load whose reads all said kGood
// holds right chunks alone.
TEST(Checksums, NeverPassALoadWithAWrongChunk) {
  const unsigned seed = std::random_device()();
  SCOPED_TRACE("seed " + std::to_string(seed));
  std::mt19937 random(seed);
  std::size_t passed = 0;
  std::size_t refused = 0;
  std::size_t dropped = 0;
  std::size_t refused_though_right = 0;
  for (int round = 0; round < 4000; ++round) {
    const Subject subject(1 + random() % 4);
    Checksums checksums =
        make_checksums(random() % 2 == 0 ? Verify::kFirst : Verify::kAlways, subject, 2);
    struct Load {
      std::size_t expert = 0;
      std::vector<std::size_t> left;
      bool wrong = false;
    };
    std::vector<Load> loads(3);
    for (int step = 0; step < 60; ++step) {
      const std::size_t s = random() % loads.size();
      Load& load = loads[s];
      if (load.left.empty()) {
        load = {};
        load.expert = random() % 2;
        for (std::size_t i = 0; i < subject.chunks.size(); ++i) load.left.push_back(i);
        std::shuffle(load.left.begin(), load.left.end(), random);
        continue;
      }
      if (random() % 12 == 0) {  // cancelled: the slot begins anew
        load.left.clear();
        ++dropped;
        continue;
      }
      const std::size_t chunk = load.left.back();
      load.left.pop_back();
      const bool wrong = random() % 5 == 0;
      load.wrong |= wrong;
      const std::uint32_t crc = subject.right[chunk] ^ (wrong ? 1u + random() % 3 : 0u);
      const bool due = checksums.due(load.expert);
      const bool good = !due || checksums.accept(load.expert, subject.chunks, chunk, crc,
                                                 slot(s)) == Verdict::kGood;
      if (!due && wrong) load.wrong = false;  // kFirst, proven: not looked at, as promised
      if (!good) {
        ++refused;
        if (!load.wrong) ++refused_though_right;
        load.left.clear();
      } else if (load.left.empty()) {
        ++passed;
        ASSERT_FALSE(load.wrong) << "round " << round << " step " << step;
      }
    }
  }
  EXPECT_GT(passed, 1000u);
  EXPECT_GT(refused, 1000u);
  EXPECT_GT(dropped, 1000u);
  EXPECT_LT(refused_though_right, refused / 2) << "a second look is the exception";
}

TEST(Checksums, JudgeFromManyThreads) {
  const Subject subject(64);
  Checksums checksums = make_checksums(Verify::kAlways, subject);
  std::vector<std::jthread> threads;
  for (std::size_t t = 0; t < 4; ++t) {
    threads.emplace_back([&, t] {
      for (int repeat = 0; repeat < 20; ++repeat) {
        for (std::size_t i = t % 2; i < 64; i += 2) {  // two threads share each slot's load
          EXPECT_EQ(checksums.accept(0, subject.chunks, i, subject.right[i], slot(t / 2)),
                    Verdict::kGood);
        }
      }
    });
  }
  threads.clear();
  EXPECT_EQ(checksums.accept(0, subject.chunks, 5, subject.right[5] ^ 4, slot(9)),
            Verdict::kMismatch);
}

}  // namespace
}  // namespace sluice
