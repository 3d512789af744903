#include "bindings/device_rates.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <cstring>
#include <deque>
#include <exception>
#include <string>
#include <thread>
#include <utility>

#include "base/error.h"
#include "kernels/bandwidth.h"
#include "kernels/bandwidth_gpu.h"

namespace sluice::bindings {
namespace {

using Clock = std::chrono::steady_clock;

constexpr std::size_t kFewestCopies = 4;
constexpr double kSeriesSeconds = 0.2;  // a slow link is not repeated for longer
constexpr int kReadLaunches = 4;        // 4 GiB each: a millisecond beside 10 us of waiting
constexpr int kEmptyLaunches = 200;     // well below the 1024 at which a launch waits for room
constexpr int kRoundTrips = 50;
constexpr std::size_t kRoundTripBytes = 64;                // the ids of a token
constexpr std::size_t kChunkBytes = std::size_t{4} << 20;  // the engine's
constexpr std::size_t kStagingBytes = std::size_t{16} << 20;
constexpr int kCopiesBesideReads = 16;  // a millisecond on the fastest links: time to look up
constexpr auto kLook = std::chrono::microseconds(100);

double seconds_since(Clock::time_point begin) {
  return std::chrono::duration<double>(Clock::now() - begin).count();
}

/// The median over `repeats` calls of `seconds_of()`, or over fewer that took long enough.
template <class SecondsOf>
double median_seconds(int repeats, SecondsOf&& seconds_of) {
  std::vector<double> found;
  const auto begin = Clock::now();
  do {
    found.push_back(seconds_of());
  } while (static_cast<int>(found.size()) < repeats && seconds_since(begin) < kSeriesSeconds);
  std::nth_element(found.begin(), found.begin() + static_cast<std::ptrdiff_t>(found.size() / 2),
                   found.end());
  return found[found.size() / 2];
}

/// Memory that copies go through from one end to the other, again and again.
class Ring {
 public:
  explicit Ring(const DeviceBuffer& buffer) : data_(buffer.data()), bytes_(buffer.bytes()) {}
  [[nodiscard]] std::byte* next(std::size_t bytes) {
    if (at_ + bytes > bytes_) at_ = 0;
    return data_ + std::exchange(at_, at_ + bytes);
  }

 private:
  std::byte* data_;
  std::size_t bytes_;
  std::size_t at_ = 0;
};

/// Points of a stream that the host waits for in their order; given back whatever happens.
class InFlight {
 public:
  InFlight(Device& device, StreamHandle stream) : device_(device), stream_(stream) {}
  ~InFlight() {
    for (const EventHandle event : events_) device_.release(event);
  }
  InFlight(const InFlight&) = delete;
  InFlight& operator=(const InFlight&) = delete;

  void mark() { events_.push_back(device_.record(stream_)); }
  [[nodiscard]] int size() const { return static_cast<int>(events_.size()); }
  void wait_for_oldest() {
    device_.synchronize(events_.front());
    drop_oldest();
  }
  void wait_for_all() {
    while (size() > 0) wait_for_oldest();
  }
  /// Whether the oldest one had passed, and is forgotten.
  bool oldest_passed() {
    if (!device_.passed(events_.front())) return false;
    drop_oldest();
    return true;
  }

 private:
  void drop_oldest() {
    device_.release(events_.front());
    events_.pop_front();
  }

  Device& device_;
  StreamHandle stream_;
  std::deque<EventHandle> events_;
};

class Measurement {
 public:
  Measurement(Device& device, ParallelFor& parallel, const DeviceProbe& probe)
      : device_(device),
        parallel_(parallel),
        probe_(probe),
        stream_(device.copy_stream()),
        gpu_{.num_multiprocessors = device.traits().num_multiprocessors,
             .shared_bytes_per_block = device.traits().shared_bytes_per_block} {}

  DeviceRates run() {
    const DeviceScope here(device_);
    const std::size_t largest =
        *std::max_element(probe_.copy_bytes.begin(), probe_.copy_bytes.end());
    const std::size_t arena = std::max(probe_.copy_total_bytes, largest);
    pinned_ = device_.allocate_pinned(arena);
    pages_ = touched(std::max(probe_.pin_bytes, largest));
    slab_ = device_.allocate_slab(arena);
    std::memset(pinned_.data(), 1, pinned_.bytes());

    time_copies();
    rates_.staging_bytes_per_s = staging_rate();
    pages_ = {};
    rates_.pin_bytes_per_s = pin_rate();
    rates_.memory_bytes_per_s = memory_rate();
    rates_.launch_s = launch_seconds();
    rates_.round_trip_s = round_trip_seconds();
    read_host_memory();
    return std::move(rates_);
  }

 private:
  DeviceBuffer touched(std::size_t bytes) {
    DeviceBuffer buffer = device_.allocate_host(bytes);
    std::memset(buffer.data(), 2, buffer.bytes());
    return buffer;
  }

  void copy(CopyWay way, std::byte* on_device, std::byte* on_host, std::size_t bytes) {
    if (way == CopyWay::kToHost) {
      device_.read_async(on_host, on_device, bytes, stream_);
    } else {
      device_.copy_async(on_device, on_host, bytes, stream_);
    }
  }

  void time_copies() {
    // Everything that is read later on has been written once.
    copy_series(CopyWay::kToDevice, slab_.bytes(), 1, 1);
    for (const CopyWay way : {CopyWay::kToDevice, CopyWay::kToHost, CopyWay::kFromPages}) {
      for (const int depth : probe_.depths) {
        if (way == CopyWay::kFromPages && depth != probe_.depths.front()) continue;
        for (const std::size_t bytes : probe_.copy_bytes) {
          const std::size_t count = std::max(kFewestCopies, probe_.copy_total_bytes / bytes);
          copy_series(way, bytes, 1, 1);  // first use of a path may cost more
          const double seconds =
              median_seconds(probe_.repeats, [&] { return copy_series(way, bytes, count, depth); });
          rates_.copies.push_back({.way = way,
                                   .depth = depth,
                                   .bytes = bytes,
                                   .seconds = seconds / static_cast<double>(count)});
        }
      }
    }
  }

  /// Seconds of `count` copies, `depth` of them in flight.
  double copy_series(CopyWay way, std::size_t bytes, std::size_t count, int depth) {
    Ring on_host(way == CopyWay::kFromPages ? pages_ : pinned_);
    Ring on_device(slab_);
    InFlight flight(device_, stream_);
    const auto begin = Clock::now();
    for (std::size_t i = 0; i < count; ++i) {
      if (flight.size() == depth) flight.wait_for_oldest();
      copy(way, on_device.next(bytes), on_host.next(bytes), bytes);
      flight.mark();
    }
    flight.wait_for_all();
    return seconds_since(begin);
  }

  double staging_rate() {
    const std::size_t piece = std::min({kStagingBytes, pinned_.bytes(), pages_.bytes()});
    const std::size_t count = pages_.bytes() / piece;
    const double seconds = median_seconds(probe_.repeats, [&] {
      Ring from(pages_);
      Ring to(pinned_);
      const auto begin = Clock::now();
      for (std::size_t i = 0; i < count; ++i) std::memcpy(to.next(piece), from.next(piece), piece);
      return seconds_since(begin);
    });
    return static_cast<double>(count * piece) / seconds;
  }

  double pin_rate() {
    const double seconds = median_seconds(probe_.repeats, [&] {
      DeviceBuffer buffer = touched(probe_.pin_bytes);
      const auto begin = Clock::now();
      const bool pinned = device_.pin(buffer);
      const double taken = seconds_since(begin);
      require<CapacityError>(pinned, [&] {
        return "measure_device: got a refusal to pin " + std::to_string(buffer.bytes()) +
               " bytes, expected that much below the limit of locked memory; raise it (ulimit -l)";
      });
      return taken;
    });
    return static_cast<double>(probe_.pin_bytes) / seconds;
  }

  double memory_rate() {
    constexpr std::size_t kLoad = 16;
    const std::size_t most = device_.memory_info().free_bytes / 2;
    rates_.read_bytes =
        std::max(kLoad, std::min<std::size_t>(probe_.read_bytes, most)) / kLoad * kLoad;
    const DeviceBuffer data = device_.allocate_slab(rates_.read_bytes);
    const auto num_sums = static_cast<std::size_t>(read_bandwidth_blocks(gpu_));
    const DeviceBuffer sums = device_.allocate_slab(num_sums * sizeof(std::uint32_t));
    InFlight flight(device_, stream_);
    for (std::size_t at = 0; at < data.bytes(); at += pinned_.bytes()) {
      const std::size_t bytes = std::min(pinned_.bytes(), data.bytes() - at);
      device_.copy_async(data.data() + at, pinned_.data(), bytes, stream_);
    }
    const auto read = [&](int launches) {
      const auto begin = Clock::now();
      for (int i = 0; i < launches; ++i) {
        launch_read_bandwidth(data.data(), data.bytes(),
                              reinterpret_cast<std::uint32_t*>(sums.data()), gpu_, stream_);
      }
      flight.mark();
      flight.wait_for_all();
      return seconds_since(begin);
    };
    read(1);  // loads the kernel, and waits for the filling
    const double seconds = median_seconds(probe_.repeats, [&] { return read(kReadLaunches); });
    return static_cast<double>(data.bytes()) * kReadLaunches / seconds;
  }

  double launch_seconds() {
    InFlight flight(device_, stream_);
    const auto launch = [&](int launches) {
      const auto begin = Clock::now();
      for (int i = 0; i < launches; ++i) launch_nothing(stream_);
      flight.mark();
      flight.wait_for_all();
      return seconds_since(begin);
    };
    launch(1);
    return median_seconds(probe_.repeats, [&] { return launch(kEmptyLaunches); }) / kEmptyLaunches;
  }

  double round_trip_seconds() {
    const std::size_t bytes = std::min(kRoundTripBytes, slab_.bytes());
    const double seconds = median_seconds(probe_.repeats, [&] {
      InFlight flight(device_, stream_);
      const auto begin = Clock::now();
      for (int i = 0; i < kRoundTrips; ++i) {
        launch_nothing(stream_);
        device_.read_async(pinned_.data(), slab_.data(), bytes, stream_);
        flight.mark();
        flight.wait_for_all();
        device_.copy_async(slab_.data(), pinned_.data(), bytes, stream_);
      }
      flight.mark();
      flight.wait_for_all();
      return seconds_since(begin);
    });
    return seconds / kRoundTrips;
  }

  void read_host_memory() {
    const DeviceBuffer memory = touched(probe_.host_bytes);
    const auto read = [&] {
      return read_bandwidth(memory.data(), memory.bytes(), probe_.repeats, parallel_);
    };
    rates_.host_bytes_per_s = read();

    const std::size_t chunk = std::min(kChunkBytes, slab_.bytes());
    std::atomic<std::int64_t> done = 0;
    std::exception_ptr failure;
    std::atomic<bool> ended = false;
    // A second thread keeps copies in flight. It sleeps between looks: a core that spins for an
    // event would be missing in the read loop.
    std::jthread feeder([&](const std::stop_token& stop) {
      try {
        Ring on_host(pinned_);
        Ring on_device(slab_);
        InFlight flight(device_, stream_);
        while (!stop.stop_requested()) {
          while (flight.size() < kCopiesBesideReads) {
            device_.copy_async(on_device.next(chunk), on_host.next(chunk), chunk, stream_);
            flight.mark();
          }
          while (flight.size() > 0 && flight.oldest_passed()) ++done;
          std::this_thread::sleep_for(kLook);
        }
        flight.wait_for_all();
      } catch (...) {
        failure = std::current_exception();
      }
      ended = true;
    });
    const auto wait_for = [&](std::int64_t copies) {
      while (done < copies && !ended) std::this_thread::sleep_for(kLook);
    };
    wait_for(1);
    const std::int64_t before = done;
    const auto begin = Clock::now();
    rates_.host_beside_copies_bytes_per_s = read();
    // One more at least: a slow link may have brought none meanwhile.
    wait_for(before + 1);
    const auto copied = static_cast<double>((done - before) * static_cast<std::int64_t>(chunk));
    rates_.link_beside_reads_bytes_per_s = copied / seconds_since(begin);
    feeder.request_stop();
    feeder.join();
    if (failure) std::rethrow_exception(failure);
  }

  Device& device_;
  ParallelFor& parallel_;
  const DeviceProbe& probe_;
  const StreamHandle stream_;
  const GpuTraits gpu_;
  DeviceBuffer pinned_;
  DeviceBuffer pages_;
  DeviceBuffer slab_;
  DeviceRates rates_;
};

void check(const DeviceProbe& probe) {
  const auto positive = [](const char* name, std::size_t value) {
    require<ConfigError>(value > 0, [&] {
      return "measure_device: got 0 for " + std::string(name) + ", expected more";
    });
  };
  positive("the number of copy_bytes", probe.copy_bytes.size());
  for (const std::size_t bytes : probe.copy_bytes) positive("copy_bytes", bytes);
  positive("copy_total_bytes", probe.copy_total_bytes);
  positive("the number of depths", probe.depths.size());
  positive("read_bytes", probe.read_bytes);
  positive("host_bytes", probe.host_bytes);
  positive("pin_bytes", probe.pin_bytes);
  const auto least = *std::min_element(probe.depths.begin(), probe.depths.end());
  require<ConfigError>(least >= 1 && probe.repeats >= 1, [&] {
    return "measure_device: got a depth of " + std::to_string(least) + " and " +
           std::to_string(probe.repeats) + " repeats, expected 1 or more of both";
  });
}

}  // namespace

DeviceRates measure_device(Device& device, ParallelFor& parallel, const DeviceProbe& probe) {
  check(probe);
  return Measurement(device, parallel, probe).run();
}

}  // namespace sluice::bindings
