// Takes the place of csrc/bindings/devices.cc in a module built for the emulation: torch's CPU
// tensors stand for those of a GPU. At the entry of a forward, and around a callback, and nowhere
// else, they are copied to the fake device and back, with the one host wait that this adds.
#include <cuda_runtime_api.h>

#include <atomic>
#include <cstring>
#include <map>
#include <string>
#include <vector>

#include "base/dtype.h"
#include "base/error.h"
#include "bindings/devices.h"
#include "engine/cuda_compute.h"
#include "tests/emulation/fake_cuda.h"
#include "tests/emulation/simt.h"

namespace sluice::bindings {
namespace py = pybind11;
namespace {

void check(const char* call, cudaError_t code) {
  require<DeviceError>(code == cudaSuccess, [&] {
    return std::string(call) + " of the bounce: got " + cudaGetErrorString(code) + "; " +
           fake::last_failure();
  });
}

template <class T>
T choice(const char* what, const std::string& value, const std::map<std::string, T>& choices) {
  const auto found = choices.find(value);
  require<ConfigError>(found != choices.end(), [&] {
    std::string names;
    for (const auto& [name, unused] : choices) names += (names.empty() ? "" : ", ") + name;
    return std::string(what) + ": got \"" + value + "\", expected one of " + names;
  });
  return found->second;
}

std::atomic<bool> on_user_stream{false};
std::atomic<bool> on_host{false};
// Of all threads; bytes on either side.
std::atomic<std::size_t> bounce_bytes{0};
std::atomic<int> bounce_streams{0};

/// Memory of one host thread on both sides, which grows and is kept.
class Bounce {
 public:
  ~Bounce() { release(); }
  Bounce() = default;
  Bounce(const Bounce&) = delete;
  Bounce& operator=(const Bounce&) = delete;

  void release() {
    if (bytes_ == 0) return;
    (void)cudaFree(device_);
    (void)cudaFreeHost(host_);
    device_ = host_ = nullptr;
    bounce_bytes -= bytes_;
    bytes_ = 0;
  }
  void begin(std::size_t bytes) {
    used_ = 0;
    if (bytes <= bytes_) return;
    release();
    check("cudaMalloc", cudaMalloc(&device_, bytes));
    check("cudaHostAlloc", cudaHostAlloc(&host_, bytes, cudaHostAllocDefault));
    bytes_ = bytes;
    bounce_bytes += bytes_;
  }
  void* to_device(const void* source, std::size_t bytes, cudaStream_t stream) {
    std::byte* const host = static_cast<std::byte*>(host_) + used_;
    void* const target = room(bytes);
    if (bytes > 0) {
      std::memcpy(host, source, bytes);
      check("cudaMemcpyAsync",
            cudaMemcpyAsync(target, host, bytes, cudaMemcpyHostToDevice, stream));
    }
    return target;
  }
  void* room(std::size_t bytes) {
    void* const target = static_cast<std::byte*>(device_) + used_;
    used_ += padded(bytes);
    return target;
  }
  void to_host(void* target, const void* source, std::size_t bytes, cudaStream_t stream) {
    if (bytes == 0) return;
    check("cudaMemcpyAsync", cudaMemcpyAsync(host_, source, bytes, cudaMemcpyDeviceToHost, stream));
    check("cudaStreamSynchronize", cudaStreamSynchronize(stream));
    std::memcpy(target, host_, bytes);
  }
  [[nodiscard]] static std::size_t padded(std::size_t bytes) { return (bytes + 255) / 256 * 256; }

 private:
  void* device_ = nullptr;
  void* host_ = nullptr;
  std::size_t bytes_ = 0;
  std::size_t used_ = 0;
};

/// What a host thread has of its own: buffers of forwards and of callbacks inside them, and the
/// stream that is torch's current one, as it were.
struct Thread {
  Bounce forward;
  Bounce callback;
  cudaStream_t stream = nullptr;

  ~Thread() { release(); }
  void release() {
    forward.release();
    callback.release();
    if (stream == nullptr) return;
    (void)cudaStreamDestroy(stream);
    stream = nullptr;
    --bounce_streams;
  }
  cudaStream_t current_stream() {
    if (!on_user_stream) return nullptr;
    if (stream == nullptr) {
      check("cudaStreamCreateWithFlags", cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
      ++bounce_streams;
    }
    return stream;
  }
};
Thread& thread() {
  thread_local Thread mine;
  return mine;
}

/// Starts the device anew, under another schedule. Errors: InternalError when something of the old
/// one is alive: a leak, unless a session is open or another thread has made forwards.
void set_schedule(const std::string& order, const std::string& policy, std::uint64_t seed,
                  const std::string& stream) {
  thread().release();
  const fake::Stats left = fake::stats();
  require<InternalError>(
      left.device_bytes + left.pinned_bytes + left.registered_bytes == 0 &&
          left.streams + left.events + left.queued == 0,
      [&] {
        return "emulation: got " + std::to_string(left.device_bytes) + " bytes of the device, " +
               std::to_string(left.pinned_bytes + left.registered_bytes) + " pinned, " +
               std::to_string(left.streams) + " streams, " + std::to_string(left.events) +
               " events, " + std::to_string(left.queued) +
               " operations alive between sessions, expected none";
      });
  const std::vector<std::string> findings = fake::findings();
  require<InternalError>(findings.empty(), [&] { return "emulation: " + findings.front(); });
  simt::options().order = choice<simt::Order>("order", order,
                                              {{"forward", simt::Order::kForward},
                                               {"reverse", simt::Order::kReverse},
                                               {"random", simt::Order::kRandom},
                                               {"skew", simt::Order::kSkew}});
  simt::options().seed = seed;
  fake::Options options;
  options.forks_lose_devices = true;
  options.policy = choice<fake::Policy>("policy", policy,
                                        {{"eager", fake::Policy::kEager},
                                         {"lazy", fake::Policy::kLazy},
                                         {"ahead", fake::Policy::kAhead},
                                         {"random", fake::Policy::kRandom}});
  options.seed = seed;
  fake::reset(options);
  on_user_stream = choice<bool>("stream", stream, {{"default", false}, {"user", true}});
}

/// Starts it anew whatever is alive: after a test that has failed.
void forget_all() {
  thread().release();
  fake::reset({});
}

void fail_after(const std::string& call, int calls, int error, bool sticky) {
  for (int i = 0; i < fake::kNumApis; ++i) {
    const auto api = static_cast<fake::Api>(i);
    if (call != fake::name(api)) continue;
    fake::fail_after(api, calls, static_cast<cudaError_t>(error), sticky);
    return;
  }
  throw ConfigError("call: got \"" + call + "\", expected a function of the CUDA runtime");
}

/// Sessions that are opened from now on compute on the host, as without a GPU: the bounces are
/// idle. Close those of the other tier first.
void choose_tier(const std::string& tier) {
  on_host = choice<bool>("tier", tier, {{"cuda", false}, {"cpu", true}});
}

/// Without what the bounces hold.
py::dict stats_of_device() {
  const fake::Stats stats = fake::stats();
  const std::size_t bounces = bounce_bytes;
  py::dict out;
  out["device_bytes"] = stats.device_bytes - bounces;
  out["peak_device_bytes"] = stats.peak_device_bytes;
  out["pinned_bytes"] = stats.pinned_bytes - bounces;
  out["registered_bytes"] = stats.registered_bytes;
  out["streams"] = stats.streams - bounce_streams;
  out["events"] = stats.events;
  out["queued"] = stats.queued;
  out["pageable_copies"] = stats.pageable_copies;
  out["launches"] = stats.launches;
  return out;
}

}  // namespace

EngineDevice open_device(const std::string& torch_device) {
  require<ConfigError>(torch_device == "cpu", [&] {
    return "device: got \"" + torch_device + "\", expected \"cpu\": the emulation's cuda:0";
  });
  if (on_host) return {.device = make_host_device(), .compute = nullptr};
  EngineDevice opened{.device = make_cuda_device(0), .compute = nullptr};
  opened.compute = make_cuda_compute(*opened.device);
  return opened;
}

void bind_devices(py::module_& m) {
  m.def("num_cuda_devices", &num_cuda_devices);
  m.def("has_slots_apart", &has_slots_apart, py::arg("device"));
  m.def("emulation_schedule", &set_schedule, py::arg("order"), py::arg("policy"), py::arg("seed"),
        py::arg("stream"), py::call_guard<py::gil_scoped_release>());
  m.def("emulation_forget", &forget_all, py::call_guard<py::gil_scoped_release>());
  m.def("emulation_tier", &choose_tier, py::arg("tier"));
  m.def("emulation_stats", &stats_of_device);
  m.def("emulation_fail_after", &fail_after, py::arg("call"), py::arg("calls"), py::arg("error"),
        py::arg("sticky") = false);
  m.def("emulation_injected", &fake::injected);
  m.def("emulation_last_failure", &fake::last_failure);
  m.def("emulation_checked", &simt::checked);
}

const char* cuda_kind() noexcept { return "emulated"; }

bool has_slots_apart(const std::string& /*torch_device*/) noexcept { return !on_host; }

void forward_tensors(Engine& engine, const ForwardArgs& args) {
  if (on_host) {
    engine.forward(args);
    return;
  }
  Bounce& bounce = thread().forward;
  const auto entries = static_cast<std::size_t>(args.num_tokens * args.top_k);
  const auto hidden = static_cast<std::size_t>(engine.store().layer(args.layer).layout.hidden);
  const std::size_t rows =
      static_cast<std::size_t>(args.num_tokens) * hidden * element_bytes(args.activations);
  const std::size_t ids = entries * sizeof(std::int64_t);
  const std::size_t weights = entries * element_bytes(args.weights_dtype);
  const cudaStream_t stream = thread().current_stream();
  bounce.begin(2 * Bounce::padded(rows) + Bounce::padded(ids) + Bounce::padded(weights));
  ForwardArgs on_device = args;
  on_device.hidden = bounce.to_device(args.hidden, rows, stream);
  on_device.expert_ids =
      static_cast<const std::int64_t*>(bounce.to_device(args.expert_ids, ids, stream));
  on_device.weights = bounce.to_device(args.weights, weights, stream);
  on_device.out = bounce.room(rows);
  on_device.stream = StreamHandle{reinterpret_cast<std::uintptr_t>(stream)};
  engine.forward(on_device);
  bounce.to_host(args.out, on_device.out, rows, stream);
}

int call_on_tensors(std::size_t in_bytes, std::size_t out_bytes, const void* in, void* out,
                    const std::function<int(const void* in, void* out)>& call) {
  if (on_host) return call(in, out);
  Bounce& bounce = thread().callback;
  const cudaStream_t stream = thread().current_stream();
  std::string source(in_bytes, '\0');
  std::string target(out_bytes, '\0');
  bounce.begin(Bounce::padded(in_bytes) + Bounce::padded(out_bytes));
  bounce.to_host(source.data(), in, in_bytes, stream);
  const int code = call(source.data(), target.data());
  if (code != 0) return code;
  const void* const made = bounce.to_device(target.data(), out_bytes, stream);
  check("cudaMemcpyAsync", cudaMemcpyAsync(out, made, out_bytes, cudaMemcpyDeviceToDevice, stream));
  check("cudaStreamSynchronize", cudaStreamSynchronize(stream));
  return 0;
}

}  // namespace sluice::bindings
