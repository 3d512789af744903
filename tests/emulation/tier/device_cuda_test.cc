// The device room's contract, on the fake runtime: memory, events, refusals, and errors that stay.
#include <gtest/gtest.h>

#include <cstring>

#include "base/error.h"
#include "tests/emulation/tier/cuda_rig.h"

namespace sluice::testing {
namespace {

/// What `act` throws, as text; empty: nothing, or another type.
template <class E, class Act>
std::string thrown(Act act) {
  try {
    act();
  } catch (const E& error) {
    return error.what();
  } catch (const std::exception& error) {
    ADD_FAILURE() << "another type: " << error.what();
    return {};
  }
  return {};
}

class CudaDevice : public ::testing::Test {
 protected:
  void SetUp() override { begin({}); }
  void TearDown() override { expect_nothing_left(); }
};

TEST_F(CudaDevice, TakesAndGivesBackEveryByte) {
  for (int round = 0; round < 10; ++round) {
    const auto device = make_cuda_device(0);
    EXPECT_FALSE(device->traits().slots_in_ram);
    EXPECT_EQ(device->traits().compute_capability, 90);
    DeviceBuffer slab = device->allocate_slab(100'000);
    DeviceBuffer host = device->allocate_host(50'000);
    EXPECT_EQ(host.kind(), MemoryKind::kHost);
    EXPECT_EQ(fake::stats().device_bytes, 100'000u);
    EXPECT_EQ(fake::stats().registered_bytes, 0u);
    ASSERT_TRUE(device->pin(host));
    EXPECT_EQ(host.kind(), MemoryKind::kPinned);
    EXPECT_EQ(fake::stats().registered_bytes, 50'000u);
    ASSERT_TRUE(device->pin(host)) << "what is pinned is pinned";
    const DeviceBuffer pinned = device->allocate_pinned(4096);
    slab = {};
    EXPECT_EQ(fake::stats().device_bytes, 0u);
  }
  expect_nothing_left();
}

TEST_F(CudaDevice, CopiesThereAndBackBehindEvents) {
  const auto device = make_cuda_device(0);
  const DeviceBuffer slab = device->allocate_slab(10'000);
  const DeviceBuffer source = device->allocate_pinned(10'000);
  const DeviceBuffer target = device->allocate_pinned(10'000);
  for (std::size_t i = 0; i < 10'000; ++i) source.data()[i] = static_cast<std::byte>(i * 7);
  const StreamHandle copies = device->copy_stream();
  device->copy_async(slab.data(), source.data(), 10'000, copies);
  const EventHandle copied = device->record(copies);
  // Back on the caller's stream, which does not wait by itself.
  device->wait(StreamHandle{}, copied);
  device->read_async(target.data(), slab.data(), 10'000, StreamHandle{});
  const EventHandle back = device->record(StreamHandle{});
  device->synchronize(back);
  EXPECT_TRUE(device->passed(back));
  EXPECT_EQ(std::memcmp(source.data(), target.data(), 10'000), 0);
  device->copy_async(slab.data(), nullptr, 0, copies);
  device->release(copied);
  device->release(back);
  EXPECT_TRUE(device->passed(EventHandle{}));
}

TEST_F(CudaDevice, EventsComeFromAPool) {
  const auto device = make_cuda_device(0);
  for (int i = 0; i < 100; ++i) {
    const EventHandle a = device->record(StreamHandle{});
    const EventHandle b = device->record(device->copy_stream());
    EXPECT_NE(a, b);
    device->release(a);
    device->release(b);
  }
  EXPECT_EQ(fake::stats().events, 2);
  must(cudaDeviceSynchronize());
}

TEST_F(CudaDevice, ASharedEventGoesBackWithItsLastOwner) {
  const auto device = make_cuda_device(0);
  const EventHandle shared = device->record(StreamHandle{});
  device->share(shared, 2);
  for (int owner = 0; owner < 2; ++owner) {
    device->release(shared);
    const EventHandle other = device->record(StreamHandle{});
    EXPECT_NE(other, shared) << "owners are left";
    device->release(other);
  }
  device->release(shared);
  const EventHandle again = device->record(StreamHandle{});
  EXPECT_EQ(again, shared) << "the last to come back is the first to go";
  device->release(again);
  EXPECT_EQ(fake::stats().events, 2);
  must(cudaDeviceSynchronize());
}

TEST_F(CudaDevice, ARefusedSlabNamesWhatWasAskedForAndWhatIsFree) {
  begin({}, {.device_bytes = 1 << 20});
  const auto device = make_cuda_device(0);
  const DeviceBuffer some = device->allocate_slab(1 << 19);
  const std::string what =
      thrown<CapacityError>([&] { (void)device->allocate_slab((1 << 19) + 4096); });
  EXPECT_NE(what.find("cuda:0"), std::string::npos) << what;
  EXPECT_NE(what.find(std::to_string((1 << 19) + 4096)), std::string::npos) << what;
  EXPECT_NE(what.find(std::to_string(1 << 19) + " of " + std::to_string(1 << 20)),
            std::string::npos)
      << what;
  // A refusal breaks nothing.
  EXPECT_EQ(device->allocate_slab(1 << 18).bytes(), std::size_t{1} << 18);
}

TEST_F(CudaDevice, ARefusedPinIsAnAnswer) {
  begin({}, {.pinned_bytes = 8192});
  const auto device = make_cuda_device(0);
  DeviceBuffer host = device->allocate_host(16'384);
  EXPECT_FALSE(device->pin(host));
  EXPECT_EQ(host.kind(), MemoryKind::kHost);
  std::memset(host.data(), 1, host.bytes());
  const std::string what = thrown<CapacityError>([&] { (void)device->allocate_pinned(16'384); });
  EXPECT_NE(what.find("16384"), std::string::npos) << what;
  EXPECT_NE(what.find("ulimit -l"), std::string::npos) << what;
}

TEST_F(CudaDevice, TheFirstBrokenContextIsToldForGood) {
  const auto device = make_cuda_device(0);
  const EventHandle event = device->record(StreamHandle{});
  fake::fail_after(fake::Api::kEventRecord, 0, cudaErrorIllegalAddress, true);
  const std::string first = thrown<DeviceError>([&] { (void)device->record(StreamHandle{}); });
  EXPECT_NE(first.find("cudaEventRecord on cuda:0"), std::string::npos) << first;
  EXPECT_NE(first.find("cudaErrorIllegalAddress (700"), std::string::npos) << first;
  EXPECT_EQ(thrown<DeviceError>([&] { (void)device->allocate_slab(64); }), first);
  EXPECT_EQ(thrown<DeviceError>([&] { device->wait(StreamHandle{}, event); }), first);
  device->release(event);
}

TEST_F(CudaDevice, ADeviceThatIsNotThereIsRefusedByNumber) {
  const std::string what = thrown<DeviceError>([] { (void)make_cuda_device(3); });
  EXPECT_NE(what.find("cuda:3"), std::string::npos) << what;
  EXPECT_NE(what.find("1 CUDA devices"), std::string::npos) << what;
  EXPECT_EQ(num_cuda_devices(), 1);
}

TEST_F(CudaDevice, AMachineWithoutADriverIsToldSo) {
  fake::fail_after(fake::Api::kGetDeviceCount, 0, cudaErrorInsufficientDriver);
  const std::string what = thrown<DeviceError>([] { (void)make_cuda_device(0); });
  EXPECT_NE(what.find("driver"), std::string::npos) << what;
  fake::fail_after(fake::Api::kGetDeviceCount, 0, cudaErrorInsufficientDriver);
  EXPECT_EQ(num_cuda_devices(), 0);
}

TEST_F(CudaDevice, AnOldDeviceIsRefusedByItsCapability) {
  fake::Options options;
  options.model.compute_major = 7;
  options.model.compute_minor = 5;
  begin({}, options);
  const std::string what = thrown<DeviceError>([] { (void)make_cuda_device(0); });
  EXPECT_NE(what.find("7.5"), std::string::npos) << what;
}

TEST_F(CudaDevice, SeesACapture) {
  const auto device = make_cuda_device(0);
  cudaStream_t stream = nullptr;
  must(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
  const StreamHandle handle{reinterpret_cast<std::uintptr_t>(stream)};
  EXPECT_FALSE(device->is_capturing(handle));
  must(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
  EXPECT_TRUE(device->is_capturing(handle));
  cudaGraph_t graph = nullptr;
  must(cudaStreamEndCapture(stream, &graph));
  must(cudaGraphDestroy(graph));
  EXPECT_FALSE(device->is_capturing(handle));
  must(cudaStreamDestroy(stream));
}

TEST_F(CudaDevice, LeavesTheCallersDeviceAsItWas) {
  fake::Options options;
  options.num_devices = 2;
  begin({}, options);
  must(cudaSetDevice(0));
  const auto device = make_cuda_device(1);
  const DeviceBuffer slab = device->allocate_slab(4096);
  device->release(device->record(device->copy_stream()));
  int now = -1;
  must(cudaGetDevice(&now));
  EXPECT_EQ(now, 0);
}

}  // namespace
}  // namespace sluice::testing
