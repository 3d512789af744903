#include "store/file.h"

#include <fcntl.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cerrno>

#include "base/bytes.h"
#include "base/error.h"
#include "store/fault_disk.h"
#include "store/io_scratch.h"
#include "store/temp_folder.h"

namespace sluice {
namespace {

using testing::FaultDisk;
using testing::pattern;
using testing::TempFolder;
using testing::write_file;

struct Blocks {
  TempFolder folder;
  std::string path = folder.file("data");
  std::vector<std::byte> bytes;
  explicit Blocks(std::size_t size) : bytes(pattern(size, size)) { write_file(path, bytes); }
};

TEST(ReadFile, ReadsTailsOfEverySizeModuloABlock) {
  for (const std::size_t size : {1, 100, 4095, 4096, 4097, 8191, 8192, 8193, 12287}) {
    const Blocks blocks(size);
    for (const bool direct : {true, false}) {
      const ReadFile file(blocks.path, direct);
      EXPECT_EQ(file.bytes(), size);
      AlignedBuffer target(align_up(size, kDirectAlignment));
      ReadFile::Cost cost;
      file.read_aligned(0, target.bytes(), size, target.data(), cost);
      EXPECT_TRUE(std::equal(blocks.bytes.begin(), blocks.bytes.end(), target.data())) << size;
      EXPECT_EQ(cost.bytes, size);
      EXPECT_EQ(cost.retries, 0u);
      EXPECT_EQ(cost.buffered, direct && !file.is_direct() ? 1u : 0u)
          << "buffered on request is no degradation";
    }
  }
}

TEST(ReadFile, ContinuesAShortReadOnceAtItsOffset) {
  const Blocks blocks(5 * 4096 + 7);
  for (const std::size_t first : {0, 1, 4096, 5000, 16384}) {
    FaultDisk disk;
    const ReadFile file(blocks.path);
    AlignedBuffer target(6 * 4096);
    disk.short_reads = 1;
    disk.short_read_bytes = first;
    ReadFile::Cost cost;
    file.read_aligned(0, target.bytes(), blocks.bytes.size(), target.data(), cost);
    EXPECT_TRUE(std::equal(blocks.bytes.begin(), blocks.bytes.end(), target.data())) << first;
    EXPECT_EQ(cost.retries, 1u);
    EXPECT_EQ(disk.reads, 2);
  }
}

TEST(ReadFile, GivesUpOnTheSecondShortRead) {
  const Blocks blocks(4 * 4096);
  FaultDisk disk;
  const ReadFile file(blocks.path);
  AlignedBuffer target(4 * 4096);
  disk.short_reads = 2;
  disk.short_read_bytes = 4096;
  ReadFile::Cost cost;
  EXPECT_REFUSED(file.read_aligned(0, target.bytes(), target.bytes(), target.data(), cost), IoError,
                 "short read: got 8192 bytes, expected 16384");
  EXPECT_EQ(cost.bytes, 8192u) << "what a failed read cost is counted";
  EXPECT_EQ(disk.reads, 2);
}

TEST(ReadFile, NeverRetriesAReadThatHoldsAllThatIsNeeded) {
  const Blocks blocks(4 * 4096);
  FaultDisk disk;
  const ReadFile file(blocks.path);
  AlignedBuffer target(4 * 4096);
  disk.short_reads = 1;
  disk.short_read_bytes = 8192;
  ReadFile::Cost cost;
  file.read_aligned(0, target.bytes(), 8000, target.data(), cost);
  EXPECT_EQ(disk.reads, 1);
}

TEST(ReadFile, GoesOnAfterInterruptions) {
  const Blocks blocks(4096);
  FaultDisk disk;
  const ReadFile file(blocks.path);
  AlignedBuffer target(4096);
  disk.interrupted_calls = 100;
  ReadFile::Cost cost;
  file.read_aligned(0, 4096, 4096, target.data(), cost);
  EXPECT_TRUE(std::equal(blocks.bytes.begin(), blocks.bytes.end(), target.data()));
  EXPECT_EQ(cost.retries, 0u);
}

TEST(ReadFile, FallsBackToBufferedReadsAndCountsThem) {
  const Blocks blocks(3 * 4096 + 5);
  FaultDisk disk;
  const ReadFile file(blocks.path);
  if (!file.is_direct()) GTEST_SKIP() << "no O_DIRECT here: every read is the fallback";
  AlignedBuffer target(4 * 4096);
  disk.refuses_direct = true;
  ReadFile::Cost cost;
  file.read_aligned(0, target.bytes(), blocks.bytes.size(), target.data(), cost);
  EXPECT_TRUE(std::equal(blocks.bytes.begin(), blocks.bytes.end(), target.data()));
  EXPECT_EQ(cost.buffered, 1u);
}

TEST(ReadFile, NamesPathOffsetAndErrnoOfAFailedRead) {
  const Blocks blocks(8192);
  FaultDisk disk;
  const ReadFile file(blocks.path);
  AlignedBuffer target(4096);
  disk.read_fails_in = 0;
  ReadFile::Cost cost;
  try {
    file.read_aligned(4096, 4096, 4096, target.data(), cost);
    FAIL() << "expected IoError";
  } catch (const IoError& error) {
    EXPECT_EQ(error.path(), blocks.path);
    EXPECT_EQ(error.offset(), 4096u);
    EXPECT_EQ(error.error_number(), EIO);
  }
}

TEST(ReadFile, RefusesWhatIsNoRegularFile) {
  const TempFolder folder;
  EXPECT_REFUSED(ReadFile(folder.file("absent")), IoError, "absent");
  EXPECT_REFUSED(ReadFile(folder.file(".")), IoError, "expected a regular file");
  EXPECT_REFUSED(ReadFile("/dev/null"), IoError, "expected a regular file");
}

TEST(ReadFile, SaysThatAFileWasCutSinceItWasOpened) {
  const Blocks blocks(8192);
  const ReadFile file(blocks.path);
  std::filesystem::resize_file(blocks.path, 5000);
  AlignedBuffer target(8192);
  ReadFile::Cost cost;
  EXPECT_REFUSED(file.read_aligned(0, 8192, 8192, target.data(), cost), IoError, "short read");
  EXPECT_REFUSED(file.read_exact(4096, 4096, target.data()), IoError, "short read: got 904 bytes");
}

TEST(WriteExact, FinishesShortWritesAndSaysWhenTheDiskIsFull) {
  const Blocks blocks(1);
  const auto bytes = pattern(100000, 5);
  FaultDisk disk;
  const FileDescriptor file(::open(blocks.path.c_str(), O_RDWR | O_TRUNC));
  disk.short_writes = 5;
  disk.interrupted_calls = 3;
  write_exact(file.get(), blocks.path, 0, bytes);
  std::vector<std::byte> there(bytes.size());
  ASSERT_EQ(read_up_to(file.get(), blocks.path, 0, there.size(), there.data()), bytes.size());
  EXPECT_EQ(there, bytes);
  disk.write_fails_in = 0;
  disk.error = ENOSPC;
  EXPECT_REFUSED(write_exact(file.get(), blocks.path, 0, bytes), IoError, "make room");
}

}  // namespace
}  // namespace sluice
