#include "device/device.h"

#include <gtest/gtest.h>

#include <cstring>
#include <limits>
#include <string>
#include <utility>
#include <vector>

#include "base/error.h"
#include "device/nvtx.h"

namespace sluice {
namespace {

TEST(HostDevice, SlabsAreWritableZeroedAndPageAligned) {
  const auto device = make_host_device();
  EXPECT_TRUE(device->traits().slots_in_ram);
  for (const std::size_t bytes : {std::size_t{1}, std::size_t{4096}, std::size_t{5} << 20}) {
    const DeviceBuffer slab = device->allocate_slab(bytes);
    ASSERT_NE(slab.data(), nullptr);
    EXPECT_EQ(slab.bytes(), bytes);
    EXPECT_EQ(reinterpret_cast<std::uintptr_t>(slab.data()) % 4096, 0u);
    EXPECT_EQ(slab.data()[bytes - 1], std::byte{0});
    std::memset(slab.data(), 1, bytes);
    const DeviceBuffer pinned = device->allocate_pinned(bytes);
    EXPECT_EQ(reinterpret_cast<std::uintptr_t>(pinned.data()) % 4096, 0u);
    std::memset(pinned.data(), 1, bytes);
  }
}

TEST(HostDevice, NothingAskedIsNothingGiven) {
  const auto device = make_host_device();
  const DeviceBuffer empty = device->allocate_slab(0);
  EXPECT_EQ(empty.data(), nullptr);
  EXPECT_EQ(empty.bytes(), 0u);
}

TEST(HostDevice, ARefusedSlabNamesWhatWasAskedAndWhatIsFree) {
  const auto device = make_host_device();
  for (const std::size_t bytes : {std::size_t{1} << 60, std::numeric_limits<std::size_t>::max()}) {
    try {
      (void)device->allocate_slab(bytes);
      FAIL() << "granted " << bytes;
    } catch (const CapacityError& error) {
      const std::string what = error.what();
      EXPECT_NE(what.find(std::to_string(bytes)), std::string::npos) << what;
      EXPECT_NE(what.find("RAM"), std::string::npos) << what;
    }
  }
}

TEST(HostDevice, CopiesAreDoneWhenTheCallReturns) {
  const auto device = make_host_device();
  const std::vector<std::byte> source(1000, std::byte{7});
  const DeviceBuffer slab = device->allocate_slab(1000);
  const StreamHandle stream = device->copy_stream();
  device->copy_async(slab.data(), source.data(), source.size(), stream);
  device->copy_async(slab.data(), nullptr, 0, stream);
  const EventHandle event = device->record(stream);
  EXPECT_TRUE(device->passed(event));
  device->wait(stream, event);
  device->synchronize(event);
  device->release(event);
  EXPECT_EQ(std::memcmp(slab.data(), source.data(), source.size()), 0);
  EXPECT_TRUE(device->passed(EventHandle{}));
}

TEST(DeviceBuffer, MovesAndLeavesNothingBehind) {
  const auto device = make_host_device();
  DeviceBuffer a = device->allocate_slab(8192);
  std::byte* const data = a.data();
  DeviceBuffer b = std::move(a);
  EXPECT_EQ(b.data(), data);
  EXPECT_EQ(a.data(),
            nullptr);  // NOLINT(bugprone-use-after-move): the state left behind is promised
  EXPECT_EQ(a.bytes(), 0u);
  DeviceBuffer c = device->allocate_pinned(100);
  c = std::move(b);
  EXPECT_EQ(c.data(), data);
  EXPECT_EQ(c.bytes(), 8192u);
  DeviceBuffer& same = c;
  c = std::move(same);
  EXPECT_EQ(c.data(), data);
  c = DeviceBuffer();
  EXPECT_EQ(c.data(), nullptr);
}

TEST(DeviceBuffer, GivesItsPagesBack) {
  // 160 TiB, more than the address space holds, a slab at a time.
  const auto device = make_host_device();
  for (int i = 0; i < 20'000; ++i) {
    const DeviceBuffer slab = device->allocate_slab(std::size_t{1} << 33);
    ASSERT_NE(slab.data(), nullptr);
  }
}

TEST(CudaDevice, ABuildWithoutCudaRefusesItByName) {
  try {
    (void)make_cuda_device(3);
    FAIL();
  } catch (const DeviceError& error) {
    EXPECT_NE(std::string(error.what()).find("cuda:3"), std::string::npos) << error.what();
    EXPECT_NE(std::string(error.what()).find("without CUDA"), std::string::npos) << error.what();
  }
}

TEST(Nvtx, ABuildWithoutCudaRefusesItByName) {
  try {
    (void)make_nvtx_ranges();
    FAIL();
  } catch (const ConfigError& error) {
    EXPECT_NE(std::string(error.what()).find("SLUICE_NVTX: got 1 in a build without CUDA"),
              std::string::npos)
        << error.what();
  }
}

}  // namespace
}  // namespace sluice
