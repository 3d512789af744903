// What tests ask of the runtime and do to it (fake_cuda.h).
#include <unistd.h>

#include "tests/emulation/fake_cuda.h"
#include "tests/emulation/fake_cuda/baton.h"
#include "tests/emulation/fake_cuda/graph.h"
#include "tests/emulation/fake_cuda/runtime.h"
#include "tests/emulation/simt.h"

namespace fake {

const char* name(Api api) { return detail::traits(api).name; }

void make_devices(Runtime& runtime) {
  runtime.owner = getpid();
  for (int ordinal = 0; ordinal < runtime.options.num_devices; ++ordinal) {
    auto legacy = std::make_unique<CUstream_st>();
    legacy->device = ordinal;
    legacy->legacy = true;
    runtime.devices.push_back({.ordinal = ordinal, .fault = cudaSuccess, .legacy = legacy.get()});
    runtime.streams.push_back(std::move(legacy));
  }
}

void reset(const Options& options) {
  Runtime& runtime = Runtime::get();
  const std::lock_guard<std::mutex> lock(runtime.mutex);
  runtime.favourite = nullptr;
  for (auto& stream : runtime.streams) {
    stream->queue.clear();
    stream->alive = false;
    runtime.old_streams.push_back(std::move(stream));
  }
  for (auto& [handle, event] : runtime.events) runtime.old_events.push_back(std::move(event));
  runtime.streams.clear();
  runtime.events.clear();
  runtime.graveyard.clear();
  runtime.devices.clear();
  runtime.graphs.clear();
  runtime.executables.clear();
  runtime.captures.clear();
  runtime.memory.reset(options);
  simt::clear_regions();
  runtime.options = options;
  ++runtime.epoch;
  runtime.rng.seed(options.seed);
  runtime.favour_period = std::uint64_t{8} << 2 * (runtime.rng() % 3);
  runtime.injections.clear();
  runtime.step_fault.reset();
  runtime.num_injected = 0;
  runtime.num_handles = 0;
  runtime.last_failure.clear();
  runtime.findings.clear();
  runtime.log.clear();
  runtime.counts = {};
  make_devices(runtime);
  Baton::get().set(options.baton, options.seed, options.baton_patience);
}

void expect_threads(int num_threads) { Baton::get().expect(num_threads); }
int batons_lost() { return Baton::get().num_lost(); }

Outside::Outside() { Baton::get().step_out(); }
Outside::~Outside() { Baton::get().step_in(); }

const Options& options() { return Runtime::get().options; }

void fail_after(Api api, int calls, cudaError_t error, bool sticky) {
  Runtime& runtime = Runtime::get();
  const std::lock_guard<std::mutex> lock(runtime.mutex);
  runtime.injections[api] = {.calls_left = calls, .error = error, .sticky = sticky};
}

void fault_after_steps(int steps, cudaError_t error) {
  Runtime& runtime = Runtime::get();
  const std::lock_guard<std::mutex> lock(runtime.mutex);
  runtime.step_fault = Injection{.calls_left = steps, .error = error, .sticky = true};
}

int injected() {
  Runtime& runtime = Runtime::get();
  const std::lock_guard<std::mutex> lock(runtime.mutex);
  return runtime.num_injected;
}

std::string last_failure() {
  Runtime& runtime = Runtime::get();
  const std::lock_guard<std::mutex> lock(runtime.mutex);
  return runtime.last_failure;
}

std::vector<std::string> findings() {
  Runtime& runtime = Runtime::get();
  const std::lock_guard<std::mutex> lock(runtime.mutex);
  return runtime.findings;
}

std::vector<Call> call_log() {
  Runtime& runtime = Runtime::get();
  const std::lock_guard<std::mutex> lock(runtime.mutex);
  return runtime.log;
}

std::size_t num_calls() {
  Runtime& runtime = Runtime::get();
  const std::lock_guard<std::mutex> lock(runtime.mutex);
  return runtime.log.size();
}

std::vector<std::string> host_waits_since(std::size_t mark) {
  Runtime& runtime = Runtime::get();
  const std::lock_guard<std::mutex> lock(runtime.mutex);
  std::vector<std::string> waits;
  for (std::size_t i = mark; i < runtime.log.size(); ++i) {
    const Call& call = runtime.log[i];
    if (!call.host_waited) continue;
    waits.push_back(std::string(name(call.api)) + " on thread " + std::to_string(call.thread));
  }
  return waits;
}

Stats stats() {
  Runtime& runtime = Runtime::get();
  const std::lock_guard<std::mutex> lock(runtime.mutex);
  Stats stats = runtime.counts;
  runtime.memory.add_to(stats);
  for (const auto& stream : runtime.streams) {
    stats.streams += stream->alive && !stream->legacy ? 1 : 0;
    stats.queued += static_cast<int>(stream->queue.size());
  }
  for (const auto& [handle, event] : runtime.events) stats.events += event->alive ? 1 : 0;
  stats.graphs = static_cast<int>(runtime.graphs.size() + runtime.executables.size());
  return stats;
}

Peek::Peek() {
  Runtime& runtime = Runtime::get();
  const std::lock_guard<std::mutex> lock(runtime.mutex);
  runtime.memory.add_peek(1);
}

Peek::~Peek() {
  Runtime& runtime = Runtime::get();
  const std::lock_guard<std::mutex> lock(runtime.mutex);
  runtime.memory.add_peek(-1);
}

}  // namespace fake
