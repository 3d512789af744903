#include "store/bandwidth.h"

#include <gtest/gtest.h>

#include "base/error.h"
#include "store/fault_disk.h"
#include "store/file.h"
#include "store/temp_folder.h"

namespace sluice {
namespace {

using testing::FaultDisk;
using testing::pattern;
using testing::TempFolder;
using testing::write_file;

TEST(DiskBandwidth, ReadsEveryRangeOnceAndGivesARate) {
  const TempFolder folder;
  const std::string path = folder.file("data");
  write_file(path, pattern(1'000'001, 1));
  if (!ReadFile(path).is_direct()) {
    EXPECT_REFUSED((void)disk_bandwidth(path, 0, 4096, 4096, 1), IoError, "O_DIRECT is refused");
    return;
  }
  FaultDisk disk;
  const std::vector<FileExtent> extents = {{0, 65536}, {900'000, 100'001}, {5000, 10}};
  EXPECT_GT(disk_bandwidth(path, extents, 65536, 3), 0.0);
  EXPECT_EQ(disk.reads, 1 + 2 + 1);
  EXPECT_GT(disk_bandwidth(path, 0, 1'000'001, 131072, 2), 0.0);
}

TEST(DiskBandwidth, RefusesRangesAndSizesThatCannotWork) {
  const TempFolder folder;
  const std::string path = folder.file("data");
  write_file(path, pattern(10000, 1));
  EXPECT_THROW((void)disk_bandwidth(path, 0, 4096, 1000, 1), ConfigError);
  EXPECT_THROW((void)disk_bandwidth(path, 0, 4096, 4096, 0), ConfigError);
  EXPECT_THROW((void)disk_bandwidth(folder.file("absent"), 0, 4096, 4096, 1), IoError);
  if (!ReadFile(path).is_direct()) return;
  EXPECT_REFUSED((void)disk_bandwidth(path, 0, 10001, 4096, 1), ConfigError, "within its 10000");
  EXPECT_THROW((void)disk_bandwidth(path, UINT64_MAX, 2, 4096, 1), ConfigError);
  EXPECT_THROW((void)disk_bandwidth(path, 0, 0, 4096, 1), ConfigError);
  FaultDisk disk;
  disk.read_fails_in = 1;
  EXPECT_THROW((void)disk_bandwidth(path, 0, 10000, 4096, 2), IoError);
}

}  // namespace
}  // namespace sluice
