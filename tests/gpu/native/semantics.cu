// What the emulation's fake runtime copies from the real one, one fact a function: each runs on
// both, so that the fake is as true as a GPU says. `expect` words what was promised; test_semantics
// runs each in a process of its own, for some lose the device.
#include <cstdint>
#include <cstring>
#include <functional>
#include <map>
#include <string>
#include <vector>

#include "kernels/launch.h"
#include "kernels/ptx.h"
#include "tests/gpu/native/api.h"

namespace {

using gpu_tests::Buffer;
using gpu_tests::Event;
using gpu_tests::expect;
using gpu_tests::Failed;
using gpu_tests::Stream;
using gpu_tests::told;
using sluice::launch;

constexpr std::size_t kBytes = std::size_t{32} << 10;  // below what pageable copies stage at once
constexpr int kCount = static_cast<int>(kBytes / sizeof(std::uint32_t));

struct Args {
  std::uint32_t* to;
  const std::uint32_t* from;
  int count;
};
__global__ void copy_kernel(const __grid_constant__ Args p) {
  for (int i = static_cast<int>(threadIdx.x); i < p.count; i += static_cast<int>(blockDim.x)) {
    p.to[i] = p.from[i];
  }
}
__global__ void poll_kernel(const __grid_constant__ Args p) {
  while (sluice::ptx::load_acquire_sys(p.from) == 0) {
  }
  if (p.to != nullptr) sluice::ptx::store_release_sys(p.to, 1);
}
__global__ void static_shared_kernel(const __grid_constant__ Args p) {
  SLUICE_DYNAMIC_SHARED(bytes);
  __shared__ std::uint32_t beside[4096];
  beside[p.count % 4096] = 5;
  reinterpret_cast<std::uint32_t*>(bytes)[p.count - 1] = 7;
  p.to[0] = reinterpret_cast<std::uint32_t*>(bytes)[p.count - 1] + beside[p.count % 4096];
}
__global__ void shared_kernel(const __grid_constant__ Args p) {
  SLUICE_DYNAMIC_SHARED(bytes);
  reinterpret_cast<std::uint32_t*>(bytes)[p.count - 1] = 7;
  p.to[0] = reinterpret_cast<std::uint32_t*>(bytes)[p.count - 1];
}

cudaError_t start_copy(std::uint32_t* to, const std::uint32_t* from, cudaStream_t stream) {
  return launch("copy", {.grid = {1}, .block = {64}, .stream = stream}, copy_kernel,
                Args{to, from, kCount});
}

void fill(std::uint32_t* words, std::uint32_t value) {
  for (int i = 0; i < kCount; ++i) words[i] = value;
}
bool all(const std::uint32_t* words, std::uint32_t value) {
  for (int i = 0; i < kCount; ++i) {
    if (words[i] != value) return false;
  }
  return true;
}

/// Holds a stream back until `open`: a kernel that polls pinned memory.
class Gate {
 public:
  explicit Gate(cudaStream_t stream) {
    *flag() = 0;
    flag()[1] = 0;
    expect("gate", launch("poll", {.grid = {1}, .block = {1}, .stream = stream}, poll_kernel,
                          Args{flag() + 1, flag(), 1}));
  }
  ~Gate() { open(); }
  void open() { __atomic_store_n(flag(), 1u, __ATOMIC_RELEASE); }

 private:
  [[nodiscard]] std::uint32_t* flag() const { return memory_.as<std::uint32_t>(); }
  Buffer memory_{64, Buffer::Kind::kPinned};
};

/// Device words and pinned ones, all of one value.
struct Pair {
  Buffer device{kBytes};
  Buffer pinned{kBytes, Buffer::Kind::kPinned};
  explicit Pair(std::uint32_t value = 0) { fill(host(), value); }
  [[nodiscard]] std::uint32_t* on_device() const { return device.as<std::uint32_t>(); }
  [[nodiscard]] std::uint32_t* host() const { return pinned.as<std::uint32_t>(); }
};
cudaError_t copy(void* to, const void* from, cudaMemcpyKind kind, cudaStream_t stream) {
  return cudaMemcpyAsync(to, from, kBytes, kind, stream);
}
void fetch(const Pair& pair, const void* from, cudaStream_t stream) {
  expect("copy back", copy(pair.host(), from, cudaMemcpyDeviceToHost, stream));
  expect("its end", cudaStreamSynchronize(stream));
}

void a_wait_for_an_event_that_was_never_recorded_is_none() {
  const Event never;
  const Stream stream;
  expect("cudaStreamWaitEvent", cudaStreamWaitEvent(stream, never, 0));
  expect("cudaEventQuery", cudaEventQuery(never));
  expect("cudaEventSynchronize", cudaEventSynchronize(never));
  expect("cudaStreamSynchronize", cudaStreamSynchronize(stream));
}

void a_wait_keeps_the_record_that_the_event_had_at_the_call() {
  const Event event;
  const Stream first, second, third;
  Gate gate(third);
  expect("record", cudaEventRecord(event, first));
  expect("wait", cudaStreamWaitEvent(second, event, 0));
  expect("record behind the gate", cudaEventRecord(event, third));
  expect("the second stream, which waits for the first record", cudaStreamSynchronize(second));
  expect("the newest record", cudaEventQuery(event), cudaErrorNotReady);
  (void)cudaGetLastError();
  gate.open();
  expect("the newest record, behind the gate", cudaEventSynchronize(event));
  expect("the third stream", cudaStreamQuery(third));
}

void an_event_holds_back_another_stream() {
  const Event ready;
  const Stream writer, reader;
  const Pair source(1), target, result;
  fill(target.host(), 0);
  Gate gate(writer);
  expect("write", copy(target.on_device(), source.host(), cudaMemcpyHostToDevice, writer));
  expect("record", cudaEventRecord(ready, writer));
  expect("wait", cudaStreamWaitEvent(reader, ready, 0));
  expect("read", start_copy(result.on_device(), target.on_device(), reader));
  gate.open();
  fetch(result, result.on_device(), reader);
  expect("what the reader saw: got other words, expected the writer's", all(result.host(), 1));
}

void pageable_memory_is_read_at_the_call() {
  const Stream stream;
  const Pair pair;
  std::vector<std::uint32_t> pages(kCount, 1);
  Gate gate(stream);
  expect("copy", copy(pair.on_device(), pages.data(), cudaMemcpyHostToDevice, stream));
  fill(pages.data(), 2);
  gate.open();
  fetch(pair, pair.on_device(), stream);
  expect("pageable source: got what was written behind the call, expected what was there at it",
         all(pair.host(), 1));
}

void pageable_memory_is_written_when_the_call_returns() {
  const Stream stream;
  const Pair pair(5);
  std::vector<std::uint32_t> pages(kCount, 0);
  expect("copy", copy(pair.on_device(), pair.host(), cudaMemcpyHostToDevice, stream));
  expect("copy back", copy(pages.data(), pair.on_device(), cudaMemcpyDeviceToHost, stream));
  expect("pageable target: got old words, expected the copy's", all(pages.data(), 5));
}

void pinned_memory_is_read_late() {
  const Stream stream;
  const Pair pair(1);
  Gate gate(stream);
  expect("copy", copy(pair.on_device(), pair.host(), cudaMemcpyHostToDevice, stream));
  fill(pair.host(), 2);
  gate.open();
  const Pair result;
  expect("the copy", cudaStreamSynchronize(stream));
  fetch(result, pair.on_device(), stream);
  expect("pinned source: got the old words, expected those at the copy's turn",
         all(result.host(), 2));
}

void registered_pages_are_pinned() {
  const Stream stream;
  const Pair result;
  std::vector<std::uint32_t> memory(kCount + 2048, 1);
  auto* const pages = reinterpret_cast<std::uint32_t*>(
      (reinterpret_cast<std::uintptr_t>(memory.data()) + 4095) / 4096 * 4096);
  expect("cudaHostRegister", cudaHostRegister(pages, kBytes, 0));
  cudaPointerAttributes attributes = {};
  expect("cudaPointerGetAttributes", cudaPointerGetAttributes(&attributes, pages));
  expect("kind of registered pages: expected host memory", attributes.type == cudaMemoryTypeHost);
  {
    Gate gate(stream);
    expect("copy", copy(result.on_device(), pages, cudaMemcpyHostToDevice, stream));
    fill(pages, 2);
    gate.open();
    expect("the copy", cudaStreamSynchronize(stream));
  }
  expect("cudaHostUnregister", cudaHostUnregister(pages));
  expect("cudaHostRegister of a registered range once more", cudaHostRegister(pages, kBytes, 0));
  expect("twice", cudaHostRegister(pages, kBytes, 0), cudaErrorHostMemoryAlreadyRegistered);
  (void)cudaGetLastError();
  expect("cudaHostUnregister", cudaHostUnregister(pages));
  expect("and again", cudaHostUnregister(pages), cudaErrorHostMemoryNotRegistered);
  (void)cudaGetLastError();
  fetch(result, result.on_device(), stream);
  expect("registered source: got the old words, expected those at the copy's turn",
         all(result.host(), 2));
}

void freeing_waits_for_the_device() {
  const Stream stream;
  const Pair pair(3), result;
  Buffer other(kBytes);
  expect("copy", copy(pair.on_device(), pair.host(), cudaMemcpyHostToDevice, stream));
  for (int i = 0; i < 200; ++i) {
    expect("kernel", start_copy(result.on_device(), pair.on_device(), stream));
  }
  expect("cudaFree", other.free());
  expect("the stream behind cudaFree", cudaStreamQuery(stream));
}

void an_unfinished_event_is_not_ready_and_that_is_no_loss() {
  const Event event;
  const Stream stream;
  Gate gate(stream);
  expect("record", cudaEventRecord(event, stream));
  expect("cudaEventQuery", cudaEventQuery(event), cudaErrorNotReady);
  expect("cudaStreamQuery", cudaStreamQuery(stream), cudaErrorNotReady);
  (void)cudaGetLastError();
  gate.open();
  expect("cudaEventSynchronize", cudaEventSynchronize(event));
  expect("cudaEventQuery", cudaEventQuery(event));
}

void bad_shapes_are_refused_at_the_call_and_forgotten() {
  const Pair pair;
  const Args args{pair.on_device(), pair.on_device(), 1};
  expect("2048 threads", launch("copy", {.grid = {1}, .block = {2048}}, copy_kernel, args),
         cudaErrorInvalidConfiguration);
  expect("no block", launch("copy", {.grid = {0}, .block = {32}}, copy_kernel, args),
         cudaErrorInvalidConfiguration);
  expect("the last error", cudaGetLastError(), cudaErrorInvalidConfiguration);
  expect("and behind it", cudaGetLastError());
  expect("the device", cudaDeviceSynchronize());
}

void shared_memory_is_granted_when_asked_for() {
  int most = 0;
  expect("attribute", cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, 0));
  const Pair pair;
  for (const int bytes : {48 * 1024, 64 * 1024, most}) {
    expect("launch with " + std::to_string(bytes) + " bytes",
           launch("shared",
                  {.grid = {1}, .block = {1}, .shared_bytes = static_cast<std::size_t>(bytes)},
                  shared_kernel, Args{pair.on_device(), nullptr, bytes / 4}));
    expect("the kernel", cudaDeviceSynchronize());
  }
  // 16 KiB of its own and 40 KiB at the launch: each below 48, together above.
  expect("launch with 40 KiB beside static memory",
         launch("static shared", {.grid = {1}, .block = {1}, .shared_bytes = 40 * 1024},
                static_shared_kernel, Args{pair.on_device(), nullptr, 40 * 1024 / 4}));
  expect("the kernel with static memory", cudaDeviceSynchronize());
  expect("more than there is",
         launch("shared",
                {.grid = {1}, .block = {1}, .shared_bytes = static_cast<std::size_t>(most) + 1024},
                shared_kernel, Args{pair.on_device(), nullptr, 1}),
         cudaErrorInvalidValue);
  (void)cudaGetLastError();
}

void the_default_stream_orders_blocking_streams_and_no_others() {
  const Stream blocking(cudaStreamDefault), free_one;
  const Pair pair;
  {
    Gate gate(free_one);
    expect("copy", copy(pair.on_device(), pair.host(), cudaMemcpyHostToDevice, nullptr));
    expect("stream 0 beside a held stream that is not blocking", cudaStreamSynchronize(nullptr));
    gate.open();
    expect("that one", cudaStreamSynchronize(free_one));
  }
  Gate gate(blocking);
  expect("copy", copy(pair.on_device(), pair.host(), cudaMemcpyHostToDevice, nullptr));
  expect("stream 0 behind a held blocking stream", cudaStreamQuery(nullptr), cudaErrorNotReady);
  (void)cudaGetLastError();
  gate.open();
  expect("stream 0", cudaStreamSynchronize(nullptr));
  expect("the blocking one", cudaStreamQuery(blocking));
}

void a_replay_reads_what_its_addresses_hold_then() {
  const Stream stream;
  const Pair from(1), to;
  cudaGraph_t graph = nullptr;
  cudaGraphExec_t replay = nullptr;
  expect("begin", cudaStreamBeginCapture(stream, cudaStreamCaptureModeGlobal));
  expect("copy", copy(from.on_device(), from.host(), cudaMemcpyHostToDevice, stream));
  expect("kernel", start_copy(to.on_device(), from.on_device(), stream));
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  expect("is capturing", cudaStreamIsCapturing(stream, &status));
  expect("status: expected active", status == cudaStreamCaptureStatusActive);
  expect("end", cudaStreamEndCapture(stream, &graph));
  expect("instantiate", cudaGraphInstantiate(&replay, graph, 0));
  for (const std::uint32_t value : {4u, 9u}) {
    fill(from.host(), value);
    expect("replay", cudaGraphLaunch(replay, stream));
    fetch(to, to.on_device(), stream);
    expect("replay: got other words, expected those of now", all(to.host(), value));
  }
  expect("destroy", cudaGraphExecDestroy(replay));
  expect("destroy", cudaGraphDestroy(graph));
}

void the_default_stream_cannot_be_captured() {
  expect("begin", cudaStreamBeginCapture(nullptr, cudaStreamCaptureModeGlobal),
         cudaErrorStreamCaptureUnsupported);
  (void)cudaGetLastError();
  expect("the device", cudaDeviceSynchronize());
}

void waiting_and_allocating_end_a_capture() {
  const std::map<std::string, std::function<cudaError_t(cudaStream_t)>> calls = {
      {"cudaStreamSynchronize", [](cudaStream_t stream) { return cudaStreamSynchronize(stream); }},
      {"cudaMalloc", [](cudaStream_t) {
         void* memory = nullptr;
         return cudaMalloc(&memory, 64);
       }}};
  for (const auto& [name, call] : calls) {
    const Stream stream;
    cudaGraph_t graph = nullptr;
    expect("begin", cudaStreamBeginCapture(stream, cudaStreamCaptureModeGlobal));
    expect(name + " inside a capture", call(stream), cudaErrorStreamCaptureUnsupported);
    expect("end of a capture with " + name, cudaStreamEndCapture(stream, &graph),
           cudaErrorStreamCaptureInvalidated);
    (void)cudaGetLastError();
    expect("the stream again", cudaStreamSynchronize(stream));
  }
}

void a_destroyed_stream_finishes_its_work() {
  const Pair pair(6), result;
  Stream stream;
  expect("copy", copy(pair.on_device(), pair.host(), cudaMemcpyHostToDevice, stream));
  expect("kernel", start_copy(result.on_device(), pair.on_device(), stream));
  expect("cudaStreamDestroy", stream.destroy());
  expect("the device", cudaDeviceSynchronize());
  fetch(result, result.on_device(), nullptr);
  expect("its work: expected to be done", all(result.host(), 6));
}

void a_refused_allocation_is_no_loss() {
  void* memory = nullptr;
  expect("cudaMalloc of a petabyte", cudaMalloc(&memory, std::size_t{1} << 50),
         cudaErrorMemoryAllocation);
  (void)cudaGetLastError();
  expect("the device", cudaDeviceSynchronize());
}

void a_fault_is_told_by_the_next_call_that_waits_and_stays() {
  Stream stream;
  auto* const wild = reinterpret_cast<std::uint32_t*>(std::uintptr_t{0x10});
  expect("launch: it does not tell its own end",
         launch("copy", {.grid = {1}, .block = {1}, .stream = stream}, copy_kernel,
                Args{wild, wild, 1}));
  expect("cudaStreamSynchronize", cudaStreamSynchronize(stream), cudaErrorIllegalAddress);
  void* memory = nullptr;
  expect("cudaMalloc", cudaMalloc(&memory, 64), cudaErrorIllegalAddress);
  expect("a launch",
         launch("copy", {.grid = {1}, .block = {1}, .stream = stream}, copy_kernel,
                Args{nullptr, nullptr, 0}),
         cudaErrorIllegalAddress);
  expect("the last error", cudaGetLastError(), cudaErrorIllegalAddress);
  expect("the last error again", cudaGetLastError(), cudaErrorIllegalAddress);
  expect("cudaStreamDestroy", stream.destroy(), cudaErrorIllegalAddress);
  int device = -1;
  expect("cudaGetDevice, which the device does not answer", cudaGetDevice(&device));
}

#define FACT(name) {#name, name}
const std::map<std::string, void (*)()> kFacts = {
    FACT(a_wait_for_an_event_that_was_never_recorded_is_none),
    FACT(a_wait_keeps_the_record_that_the_event_had_at_the_call),
    FACT(an_event_holds_back_another_stream),
    FACT(pageable_memory_is_read_at_the_call),
    FACT(pageable_memory_is_written_when_the_call_returns),
    FACT(pinned_memory_is_read_late),
    FACT(registered_pages_are_pinned),
    FACT(freeing_waits_for_the_device),
    FACT(an_unfinished_event_is_not_ready_and_that_is_no_loss),
    FACT(bad_shapes_are_refused_at_the_call_and_forgotten),
    FACT(shared_memory_is_granted_when_asked_for),
    FACT(the_default_stream_orders_blocking_streams_and_no_others),
    FACT(a_replay_reads_what_its_addresses_hold_then),
    FACT(the_default_stream_cannot_be_captured),
    FACT(waiting_and_allocating_end_a_capture),
    FACT(a_destroyed_stream_finishes_its_work),
    FACT(a_refused_allocation_is_no_loss),
    FACT(a_fault_is_told_by_the_next_call_that_waits_and_stays),
};
#undef FACT

}  // namespace

/// "real" or "emulated".
SLUICE_GPU_API const char* semantics_runtime() {
#if defined(SLUICE_EMULATE)
  return "emulated";
#else
  return "real";
#endif
}
/// Names, one a line.
SLUICE_GPU_API const char* semantics_facts() {
  std::string names;
  for (const auto& [name, unused] : kFacts) names += name + "\n";
  return told(names);
}
/// Null when the runtime does as the name says. `policy`: of the emulation's streams, 0 to 3.
SLUICE_GPU_API const char* semantics_run(const char* name, [[maybe_unused]] int policy) {
  const auto fact = kFacts.find(name);
  if (fact == kFacts.end()) return told(std::string("no fact ") + name);
#if defined(SLUICE_EMULATE)
  fake::reset({.policy = static_cast<fake::Policy>(policy)});
#endif
  try {
    fact->second();
    return nullptr;
  } catch (const Failed& failed) {
    return told(failed.text);
  }
}
