#include <gtest/gtest.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cerrno>
#include <csignal>
#include <random>
#include <thread>

#include "base/error.h"
#include "store/experts.h"
#include "store/fault_disk.h"
#include "store/pack/journal.h"
#include "store/pack/pack.h"

namespace sluice {
namespace {

using testing::canonical_expert;
using testing::FaultDisk;
using testing::read_text;
using testing::seed_of;
using testing::small_manifest;
using testing::TempFolder;
using testing::write_file;
using testing::write_pack;

constexpr std::uint64_t kSyncEachBlob = 1;

std::vector<std::vector<std::byte>> all_experts(const PackManifest& manifest) {
  std::vector<std::vector<std::byte>> out;
  for (std::size_t l = 0; l < manifest.layers.size(); ++l) {
    for (std::int32_t e = 0; e < manifest.layers[l].num_experts; ++e) {
      out.push_back(canonical_expert(manifest.layers[l].layout, seed_of(l, e)));
    }
  }
  return out;
}

class PackWriting : public ::testing::Test {
 protected:
  PackWriting() {
    write_pack(folder_.file("whole"), manifest_);
    whole_ = read_text(folder_.file("whole"));
  }

  // Writes what is missing, at most `limit` experts; finishes if it got to the end.
  std::int64_t go_on(std::size_t limit = SIZE_MAX, std::uint64_t sync_bytes = kSyncEachBlob) {
    PackWriter writer(path_, manifest_, false, sync_bytes);
    auto next = static_cast<std::size_t>(writer.resumed_experts());
    for (; next < experts_.size() && limit > 0; ++next, --limit) writer.append(experts_[next]);
    if (next == experts_.size()) writer.finish();
    return writer.resumed_experts();
  }

  void expect_whole() {
    EXPECT_TRUE(read_text(path_) == whole_) << "the finished file differs";
    EXPECT_FALSE(std::filesystem::exists(path_ + ".partial"));
    EXPECT_FALSE(std::filesystem::exists(path_ + ".journal"));
    EXPECT_NO_THROW(verify_pack(path_, {}));
  }

  TempFolder folder_;
  std::string path_ = folder_.file("a.sluice.safetensors");
  PackManifest manifest_ = small_manifest();
  std::vector<std::vector<std::byte>> experts_ = all_experts(manifest_);
  std::string whole_;
};

TEST_F(PackWriting, GivesTheSameBytesForTheSameInput) {
  EXPECT_EQ(go_on(), 0);
  expect_whole();
}

TEST_F(PackWriting, ResumesBehindTheLastExpertWhereverItStopped) {
  for (std::size_t stop = 0; stop <= experts_.size(); ++stop) {
    if (stop < experts_.size()) {
      EXPECT_EQ(go_on(stop, PackWriter::kSyncBytes), 0);
      EXPECT_FALSE(std::filesystem::exists(path_));
      EXPECT_EQ(go_on(), static_cast<std::int64_t>(stop)) << "closing journals what is written";
    } else {
      EXPECT_EQ(go_on(), 0);
    }
    expect_whole();
    std::filesystem::remove(path_);
  }
}

TEST_F(PackWriting, ResumesOneExpertAtATime) {
  for (std::size_t i = 0; i < experts_.size(); ++i) {
    EXPECT_EQ(go_on(1), static_cast<std::int64_t>(i));
  }
  expect_whole();
}

TEST_F(PackWriting, FallsBackToTheLastBlobThatIsWhole) {
  EXPECT_EQ(go_on(3), 0);
  const Journal journal = Journal::parse(read_text(path_ + ".journal"));
  ASSERT_EQ(journal.checksums.size(), 3u);
  std::string text = read_text(path_ + ".partial");
  text[4096 + 2 * 12288 + 7] ^= 1;  // in the third blob
  write_file(path_ + ".partial", text);
  EXPECT_EQ(go_on(), 2);
  expect_whole();
}

TEST_F(PackWriting, StartsOverWhenTheFileHasLessThanTheJournalSays) {
  EXPECT_EQ(go_on(3), 0);
  std::filesystem::resize_file(path_ + ".partial", 5000);
  EXPECT_EQ(go_on(), 0);
  expect_whole();
}

TEST_F(PackWriting, IgnoresATornLineOfTheJournal) {
  EXPECT_EQ(go_on(3), 0);
  std::string text = read_text(path_ + ".journal");
  write_file(path_ + ".journal", text.substr(0, text.size() - 3));
  EXPECT_EQ(go_on(), 2);
  expect_whole();
}

TEST_F(PackWriting, IgnoresAJournalWithoutItsPartialFile) {
  EXPECT_EQ(go_on(3), 0);
  std::filesystem::remove(path_ + ".partial");
  EXPECT_EQ(go_on(), 0);
  expect_whole();
}

TEST_F(PackWriting, RefusesAJournalOfAnotherSourceUnlessFresh) {
  EXPECT_EQ(go_on(3), 0);
  PackManifest other = manifest_;
  other.source_fingerprint = std::string(64, '0');
  EXPECT_REFUSED(PackWriter(path_, other), ConfigError, "another model, revision or layout");
  EXPECT_EQ(go_on(1), 3) << "the refusal left everything as it was";
  {
    PackWriter writer(path_, manifest_, true);
    EXPECT_EQ(writer.resumed_experts(), 0);
    for (const auto& expert : experts_) writer.append(expert);
    writer.finish();
  }
  expect_whole();
}

TEST_F(PackWriting, RefusesASecondWriterAndNamesTheFirst) {
  {
    PackWriter first(path_, manifest_);
    EXPECT_REFUSED(PackWriter(path_, manifest_), IoError,
                   "process " + std::to_string(::getpid()) + " writes the same pack");
    for (const auto& expert : experts_) first.append(expert);
    first.finish();
    EXPECT_NO_THROW(PackWriter(path_, manifest_)) << "the first one is done";
  }
  std::filesystem::remove(path_ + ".partial");
  std::filesystem::remove(path_ + ".journal");
  expect_whole();
}

TEST_F(PackWriting, RefusesASecondProcessUntilTheFirstIsGone) {
  int ready[2];
  ASSERT_EQ(::pipe(ready), 0);
  const pid_t child = ::fork();
  ASSERT_GE(child, 0);
  if (child == 0) {
    const PackWriter writer(path_, manifest_);
    (void)!::write(ready[1], "x", 1);
    for (;;) ::pause();
  }
  char byte = 0;
  ASSERT_EQ(::read(ready[0], &byte, 1), 1);
  EXPECT_REFUSED(PackWriter(path_, manifest_), IoError, "process " + std::to_string(child));
  ::kill(child, SIGKILL);
  ASSERT_EQ(::waitpid(child, nullptr, 0), child);
  ::close(ready[0]);
  ::close(ready[1]);
  EXPECT_EQ(go_on(), 0);
  expect_whole();
}

TEST_F(PackWriting, NeverWritesIntoAPackThatAnotherFinishedBetweenItsOpenAndItsLock) {
  write_file(path_ + ".partial", whole_);  // the other's, about to be renamed
  FaultDisk disk;
  int locks = 0;
  disk.before_lock = [&] {
    if (++locks == 1) std::filesystem::rename(path_ + ".partial", path_);
  };
  PackWriter writer(path_, manifest_);
  EXPECT_EQ(locks, 2) << "what it had opened is a finished pack by now";
  EXPECT_TRUE(std::filesystem::exists(path_ + ".partial"));
  for (const auto& expert : experts_) writer.append(expert);
  EXPECT_TRUE(read_text(path_) == whole_);
  writer.finish();
  expect_whole();
}

// The child kills itself behind its n-th write or sync, for random n, until one run gets through.
TEST_F(PackWriting, SurvivesBeingKilledAnywhere) {
  const unsigned seed = std::random_device()();
  SCOPED_TRACE("seed " + std::to_string(seed));
  std::mt19937 random(seed);
  static std::uint32_t writes_left = 0;
  std::int64_t kills = 0;
  for (int round = 0; round < 12; ++round) {
    for (;;) {
      const std::uint32_t limit = 1 + random() % 14;
      const pid_t child = ::fork();
      ASSERT_GE(child, 0);
      if (child == 0) {
        FaultDisk disk;
        writes_left = limit;
        disk.after_write = [] {
          if (--writes_left == 0) ::kill(::getpid(), SIGKILL);
        };
        (void)go_on();
        ::_exit(0);
      }
      int status = 0;
      ASSERT_EQ(::waitpid(child, &status, 0), child);
      if (WIFEXITED(status)) {
        ASSERT_EQ(WEXITSTATUS(status), 0);
        break;
      }
      ++kills;
      EXPECT_FALSE(std::filesystem::exists(path_)) << "nothing half-written passes for whole";
      if (kills > 500) FAIL() << "no progress";
    }
    expect_whole();
    std::filesystem::remove(path_);
  }
  EXPECT_GT(kills, 10);
}

TEST_F(PackWriting, RefusesADiskThatIsTooSmallBeforeTheFirstByte) {
  FaultDisk disk;
  disk.free = 10000;
  EXPECT_REFUSED(PackWriter(path_, manifest_), IoError, "got 10000 free bytes on the disk");
  EXPECT_FALSE(std::filesystem::exists(path_ + ".partial"));
  EXPECT_FALSE(std::filesystem::exists(path_ + ".journal"));
  disk.free = whole_.size();
  EXPECT_EQ(go_on(), 0);
  expect_whole();
}

TEST_F(PackWriting, StopsAtEveryFailedWriteOrSyncAndResumes) {
  for (const bool sync : {false, true}) {
    for (std::int64_t n = 0; n < 14; ++n) {
      bool failed = false;
      {
        FaultDisk disk;
        disk.error = sync ? EIO : ENOSPC;
        (sync ? disk.sync_fails_in : disk.write_fails_in) = n;
        try {
          (void)go_on();
        } catch (const IoError& error) {
          failed = true;
          EXPECT_EQ(error.error_number(), disk.error);
        }
      }
      if (failed) {
        EXPECT_FALSE(std::filesystem::exists(path_));
        (void)go_on();
      }
      expect_whole();
      EXPECT_TRUE(failed || n >= 12) << n;
      std::filesystem::remove(path_);
    }
  }
}

TEST_F(PackWriting, NeverGoesOnAfterAFailure) {
  FaultDisk disk;
  PackWriter writer(path_, manifest_, false, kSyncEachBlob);
  disk.sync_fails_in = 0;
  EXPECT_THROW(writer.append(experts_[0]), IoError);
  disk.sync_fails_in = -1;
  EXPECT_REFUSED(writer.append(experts_[0]), InternalError, "after it failed");
  EXPECT_REFUSED(writer.finish(), InternalError, "make a new writer to resume");
}

TEST_F(PackWriting, RefusesWrongSizesAndNumbersOfExpertsAndGoesOn) {
  PackWriter writer(path_, manifest_);
  EXPECT_EQ(writer.num_experts(), 5);
  EXPECT_EQ(writer.file_bytes(), whole_.size());
  EXPECT_REFUSED(writer.finish(), InternalError, "got 0 experts, expected 5");
  EXPECT_REFUSED(writer.append(std::span(experts_[0]).first(10)), InternalError,
                 "got an expert of 10 bytes");
  for (const auto& expert : experts_) writer.append(expert);
  EXPECT_REFUSED(writer.append(experts_[0]), InternalError, "got an expert more");
  writer.finish();
  EXPECT_REFUSED(writer.finish(), InternalError, "after it finished");
  expect_whole();
}

TEST_F(PackWriting, RefusesAManifestThatNoReaderWouldTake) {
  PackManifest bad = manifest_;
  bad.layers[0].layout.hidden = 0;
  EXPECT_THROW(PackWriter(path_, bad), CheckpointError);
  bad.layers.clear();
  EXPECT_THROW(PackWriter(path_, bad), CheckpointError);
  EXPECT_FALSE(std::filesystem::exists(path_ + ".partial"));
  EXPECT_REFUSED(PackWriter("/absent/folder/a", manifest_), IoError, "/absent/folder/a.partial");
}

TEST_F(PackWriting, LeavesReadersOfAFinishedPackAlone) {
  EXPECT_EQ(go_on(), 0);
  const auto store = open_pack(path_, {.chunk_bytes = 4096, .verify = Verify::kAlways});
  const pid_t child = ::fork();
  ASSERT_GE(child, 0);
  if (child == 0) {  // packs over the same name and elsewhere
    for (int i = 0; i < 10; ++i) {
      write_pack(path_, manifest_);
      write_pack(folder_.file("elsewhere"), manifest_);
    }
    ::_exit(0);
  }
  int status = -1;
  while (::waitpid(child, &status, WNOHANG) == 0) {
    EXPECT_EQ(testing::read_expert(*store, make_key(0, 1)), experts_[1]);
    EXPECT_NO_THROW(verify_pack(path_, {})) << "a name is always a whole pack";
  }
  EXPECT_EQ(status, 0);
}

TEST(Journal, ReadsWhatItWritesAndNothingElse) {
  Journal journal{.header_sha256 = std::string(64, 'a'), .pid = 42, .checksums = {}};
  const std::string text =
      journal.first_line() + Journal::line(0, 0xdeadbeef) + Journal::line(1, 7);
  const Journal parsed = Journal::parse(text);
  EXPECT_EQ(parsed.header_sha256, journal.header_sha256);
  EXPECT_EQ(parsed.pid, 42);
  EXPECT_EQ(parsed.checksums, (std::vector<std::uint32_t>{0xdeadbeef, 7}));
  for (std::size_t cut = 0; cut < text.size(); ++cut) {
    const Journal torn = Journal::parse(text.substr(0, cut));
    EXPECT_LE(torn.checksums.size(), 1u);
    EXPECT_TRUE(torn.header_sha256.empty() || torn.header_sha256 == journal.header_sha256);
  }
  EXPECT_TRUE(Journal::parse("nonsense\n0 00000000\n").header_sha256.empty());
  EXPECT_EQ(Journal::parse(text + "3 00000000\n").checksums.size(), 2u) << "a line is missing";
  EXPECT_EQ(Journal::parse(text + "2 0000\n").checksums.size(), 2u);
  EXPECT_EQ(Journal::parse(text + "2 0000000g\n").checksums.size(), 2u);
}

}  // namespace
}  // namespace sluice
