#include "bindings/device_rates.h"

#include <gtest/gtest.h>

#include <functional>
#include <map>
#include <memory>
#include <string>
#include <tuple>

#include "base/error.h"
#include "base/parallel.h"
#include "kernels/bandwidth_gpu.h"
#include "tests/emulation/fake_cuda.h"
#include "tests/emulation/fake_cuda_fixture.h"
#include "tests/emulation/simt.h"

namespace sluice::bindings {
namespace {

constexpr std::size_t kKiB = 1024;

DeviceProbe small_probe() {
  return {.copy_bytes = {16 * kKiB, 32 * kKiB},
          .copy_total_bytes = 128 * kKiB,
          .depths = {1, 3},
          .read_bytes = 64 * kKiB + 7,
          .host_bytes = 256 * kKiB,
          .pin_bytes = 64 * kKiB,
          .repeats = 1};
}

/// The device, and how often each way was taken with copies of one size.
class CountingDevice final : public Device {
 public:
  explicit CountingDevice(std::size_t bytes) : bytes_(bytes) {}

  int to_device = 0;
  int to_host = 0;

  DeviceTraits traits() const override { return device_->traits(); }
  DeviceBuffer allocate_slab(std::size_t bytes) override { return device_->allocate_slab(bytes); }
  DeviceBuffer allocate_host(std::size_t bytes) override { return device_->allocate_host(bytes); }
  bool pin(DeviceBuffer& buffer) override { return device_->pin(buffer); }
  MemoryInfo memory_info() override { return device_->memory_info(); }
  StreamHandle copy_stream() override { return device_->copy_stream(); }
  void copy_async(std::byte* target, const std::byte* source, std::size_t bytes,
                  StreamHandle stream) override {
    if (bytes == bytes_) ++to_device;
    device_->copy_async(target, source, bytes, stream);
  }
  void read_async(std::byte* target, const std::byte* source, std::size_t bytes,
                  StreamHandle stream) override {
    if (bytes == bytes_) ++to_host;
    device_->read_async(target, source, bytes, stream);
  }
  EventHandle record(StreamHandle stream) override { return device_->record(stream); }
  void wait(StreamHandle stream, EventHandle event) override { device_->wait(stream, event); }
  void synchronize(EventHandle event) override { device_->synchronize(event); }
  bool passed(EventHandle event) override { return device_->passed(event); }
  void share(EventHandle event, int more) noexcept override { device_->share(event, more); }
  void release(EventHandle event) noexcept override { device_->release(event); }
  bool is_capturing(StreamHandle stream) override { return device_->is_capturing(stream); }

 private:
  // Buffers belong to the device behind.
  void free_buffer(std::byte* /*data*/, std::size_t /*bytes*/,
                   MemoryKind /*kind*/) noexcept override {}

  const std::unique_ptr<Device> device_ = make_cuda_device(0);
  const std::size_t bytes_;
};

DeviceRates measure(const DeviceProbe& probe) {
  const auto device = make_cuda_device(0);
  const auto parallel = make_thread_pool(2);
  return measure_device(*device, *parallel, probe);
}

/// What measuring `probe` throws.
std::string refusal(const DeviceProbe& probe) {
  try {
    (void)measure(probe);
  } catch (const Error& error) {
    return error.what();
  }
  return "nothing was refused";
}

void expect_nothing_left(const std::string& where) {
  const fake::Stats now = fake::stats();
  EXPECT_EQ(now.device_bytes, 0u) << where;
  EXPECT_EQ(now.pinned_bytes, 0u) << where;
  EXPECT_EQ(now.registered_bytes, 0u) << where;
  EXPECT_EQ(now.streams, 0) << where;
  EXPECT_EQ(now.events, 0) << where;
  EXPECT_EQ(now.queued, 0) << where;
}

using DeviceRatesTest = fake::FakeCuda;

TEST_F(DeviceRatesTest, MeasuresEveryWaySizeAndDepthAndGivesEverythingBack) {
  for (const fake::Policy policy :
       {fake::Policy::kEager, fake::Policy::kLazy, fake::Policy::kAhead, fake::Policy::kRandom}) {
    SCOPED_TRACE(fake::to_string(policy));
    start({.policy = policy});
    const DeviceRates found = measure(small_probe());
    std::map<std::tuple<CopyWay, int, std::size_t>, double> copies;
    for (const CopyTime& copy : found.copies) {
      copies[{copy.way, copy.depth, copy.bytes}] = copy.seconds;
      EXPECT_GT(copy.seconds, 0);
    }
    for (const std::size_t bytes : small_probe().copy_bytes) {
      for (const CopyWay way : {CopyWay::kToDevice, CopyWay::kToHost}) {
        for (const int depth : {1, 3}) EXPECT_TRUE(copies.contains({way, depth, bytes}));
      }
      EXPECT_TRUE(copies.contains({CopyWay::kFromPages, 1, bytes}));
    }
    EXPECT_EQ(copies.size(), 10u);
    EXPECT_EQ(copies.size(), found.copies.size());
    EXPECT_EQ(found.read_bytes, 64 * kKiB);  // whole loads
    for (const double rate :
         {found.memory_bytes_per_s, found.launch_s, found.round_trip_s, found.pin_bytes_per_s,
          found.staging_bytes_per_s, found.host_bytes_per_s, found.host_beside_copies_bytes_per_s,
          found.link_beside_reads_bytes_per_s}) {
      EXPECT_GT(rate, 0);
    }
    expect_nothing_left("after measuring");
    EXPECT_GT(fake::stats().pageable_copies, 0u);
  }
}

TEST_F(DeviceRatesTest, TakesEachWayAsOftenAsTheTotalHoldsAndFourTimesAtLeast) {
  const auto parallel = make_thread_pool(1);
  for (const auto& [total, count] : {std::pair{128 * kKiB, 8}, {16 * kKiB, 4}}) {
    start({});  // which also forgets ranges that were pinned: pages of the next round may lie there
    DeviceProbe probe = small_probe();
    probe.copy_bytes = {16 * kKiB};
    probe.copy_total_bytes = total;
    probe.host_bytes = probe.read_bytes = 16;
    CountingDevice device(16 * kKiB);
    (void)measure_device(device, *parallel, probe);
    // Each series with one copy ahead of it, at both depths.
    EXPECT_EQ(device.to_host, 2 * (count + 1)) << total;
    // The same, once from pages, and copies beside the reads of RAM.
    EXPECT_GE(device.to_device, 3 * (count + 1)) << total;
  }
}

// All of `depth` are in flight before the host waits for the first.
TEST_F(DeviceRatesTest, KeepsAsManyCopiesInFlightAsItSays) {
  start({.policy = fake::Policy::kLazy});
  DeviceProbe probe = small_probe();
  probe.copy_bytes = {16 * kKiB};
  probe.depths = {3};
  (void)measure(probe);
  int in_flight = 0;
  int most = 0;
  for (const fake::Call& call : fake::call_log()) {
    if (call.thread != fake::call_log().front().thread) continue;
    if (call.api == fake::Api::kEventRecord) most = std::max(most, ++in_flight);
    if (call.api == fake::Api::kEventSynchronize) --in_flight;
  }
  EXPECT_EQ(most, 3);
}

TEST_F(DeviceRatesTest, GivesEverythingBackWhereverACallFails) {
  DeviceProbe probe = small_probe();
  probe.copy_bytes = {16 * kKiB};
  probe.depths = {1};
  using Api = fake::Api;
  for (const auto& [api, error] : {std::pair{Api::kMalloc, cudaErrorMemoryAllocation},
                                   {Api::kHostRegister, cudaErrorMemoryAllocation},
                                   {Api::kMemcpyAsync, cudaErrorInvalidValue},
                                   {Api::kEventCreate, cudaErrorMemoryAllocation},
                                   {Api::kLaunchKernel, cudaErrorLaunchOutOfResources},
                                   {Api::kEventSynchronize, cudaErrorUnknown}}) {
    for (const int calls : {0, 1, 2, 5, 30}) {
      start({.policy = fake::Policy::kRandom, .seed = 3});
      fake::fail_after(api, calls, error);
      const std::string where =
          std::string(fake::name(api)) + " number " + std::to_string(calls + 1);
      const std::string told = refusal(probe);
      if (fake::injected() == 0) {
        EXPECT_EQ(told, "nothing was refused") << where;
        continue;
      }
      EXPECT_NE(told, "nothing was refused") << where;
      expect_nothing_left(where + ": " + told);
    }
  }
}

TEST_F(DeviceRatesTest, SaysThatPinningWasRefused) {
  // The first range is the copies' own memory, the second the one whose pinning is timed.
  fake::fail_after(fake::Api::kHostRegister, 1, cudaErrorMemoryAllocation);
  const std::string told = refusal(small_probe());
  EXPECT_NE(told.find("got a refusal to pin 65536 bytes"), std::string::npos) << told;
  expect_nothing_left(told);
}

TEST_F(DeviceRatesTest, RefusesAProbeOfNothing) {
  const std::map<std::string, std::function<void(DeviceProbe&)>> cases = {
      {"got 0 for the number of copy_bytes", [](DeviceProbe& p) { p.copy_bytes.clear(); }},
      {"got 0 for copy_bytes", [](DeviceProbe& p) { p.copy_bytes = {0}; }},
      {"got 0 for copy_total_bytes", [](DeviceProbe& p) { p.copy_total_bytes = 0; }},
      {"got 0 for the number of depths", [](DeviceProbe& p) { p.depths.clear(); }},
      {"got a depth of 0 and 1 repeats", [](DeviceProbe& p) { p.depths = {2, 0}; }},
      {"got a depth of 1 and 0 repeats", [](DeviceProbe& p) { p.repeats = 0; }},
      {"got 0 for read_bytes", [](DeviceProbe& p) { p.read_bytes = 0; }},
      {"got 0 for host_bytes", [](DeviceProbe& p) { p.host_bytes = 0; }},
      {"got 0 for pin_bytes", [](DeviceProbe& p) { p.pin_bytes = 0; }},
  };
  for (const auto& [words, change] : cases) {
    DeviceProbe probe = small_probe();
    change(probe);
    const std::string told = refusal(probe);
    EXPECT_NE(told.find(words), std::string::npos) << told;
  }
}

TEST_F(DeviceRatesTest, TellsFactsWithoutMemoryOnTheDevice) {
  const CudaDeviceFacts facts = cuda_device_facts(0);
  EXPECT_EQ(facts.pci_address, "0000:00:00.0");
  EXPECT_EQ(facts.compute_capability, 90);
  EXPECT_EQ(facts.num_multiprocessors, 2);
  EXPECT_EQ(facts.driver_cuda_version, CUDART_VERSION);
  EXPECT_EQ(fake::stats().peak_device_bytes, 0u);
  try {
    (void)cuda_device_facts(1);
    ADD_FAILURE() << "expected DeviceError";
  } catch (const DeviceError& error) {
    EXPECT_NE(std::string(error.what()).find("cuda:1: got cudaErrorInvalidDevice"),
              std::string::npos)
        << error.what();
  }
}

// The figure would be of nothing if the kernel left something out.
TEST_F(DeviceRatesTest, TheReadKernelReadsEveryWordOnce) {
  const auto device = make_cuda_device(0);
  const GpuTraits gpu{.num_multiprocessors = 2, .shared_bytes_per_block = 99 * kKiB};
  const StreamHandle stream = device->copy_stream();
  for (const std::size_t bytes : {std::size_t{0}, std::size_t{16}, 64 * kKiB, 256 * kKiB + 48}) {
    DeviceBuffer host = device->allocate_pinned(std::max<std::size_t>(bytes, 4096));
    auto* const words = reinterpret_cast<std::uint32_t*>(host.data());
    std::uint32_t expected = 0;
    for (std::size_t i = 0; i < bytes / 4; ++i) {
      words[i] = static_cast<std::uint32_t>(i * 2654435761u + 1);
      expected += words[i];
    }
    const DeviceBuffer data = device->allocate_slab(std::max<std::size_t>(bytes, 16));
    const auto blocks = static_cast<std::size_t>(read_bandwidth_blocks(gpu));
    const DeviceBuffer sums = device->allocate_slab(blocks * 4);
    DeviceBuffer back = device->allocate_pinned(blocks * 4);
    device->copy_async(data.data(), host.data(), bytes, stream);
    launch_read_bandwidth(data.data(), bytes, reinterpret_cast<std::uint32_t*>(sums.data()), gpu,
                          stream);
    device->read_async(back.data(), sums.data(), blocks * 4, stream);
    const EventHandle done = device->record(stream);
    device->synchronize(done);
    device->release(done);
    std::uint32_t sum = 0;
    for (std::size_t b = 0; b < blocks; ++b) {
      sum += reinterpret_cast<const std::uint32_t*>(back.data())[b];
    }
    EXPECT_EQ(sum, expected) << bytes;
  }
}

}  // namespace
}  // namespace sluice::bindings
