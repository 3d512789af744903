// Takes the place of csrc/bindings/devices.cc in a module built for the emulation: torch's CPU
// tensors stand for those of a GPU. At the entry of a forward, and around a callback, and nowhere
// else, they are copied to the fake device and back, with the one host wait that this adds.
#include <cuda_runtime_api.h>

#include <cstdlib>
#include <cstring>
#include <map>
#include <string>
#include <string_view>

#include "base/dtype.h"
#include "base/error.h"
#include "bindings/devices.h"
#include "engine/cuda_compute.h"
#include "tests/emulation/fake_cuda.h"
#include "tests/emulation/simt.h"

namespace sluice::bindings {
namespace {

void check(const char* call, cudaError_t code) {
  require<DeviceError>(code == cudaSuccess, [&] {
    return std::string(call) + " of the bounce: got " + cudaGetErrorString(code) + "; " +
           fake::last_failure();
  });
}

std::string setting(const char* name, const char* otherwise) {
  const char* const value = std::getenv(name);
  return value == nullptr ? otherwise : value;
}

template <class T>
T choice(const char* name, const char* otherwise, const std::map<std::string, T>& choices) {
  const std::string value = setting(name, otherwise);
  const auto found = choices.find(value);
  require<ConfigError>(found != choices.end(), [&] {
    return std::string(name) + ": got \"" + value + "\", expected another";
  });
  return found->second;
}

/// SLUICE_EMULATION_{ORDER,POLICY,SEED,STREAM}, read once: a schedule is a process's.
struct Schedule {
  bool on_user_stream = false;

  Schedule() {
    const std::uint64_t seed = std::stoull(setting("SLUICE_EMULATION_SEED", "1"));
    simt::options().order = choice<simt::Order>("SLUICE_EMULATION_ORDER", "forward",
                                                {{"forward", simt::Order::kForward},
                                                 {"reverse", simt::Order::kReverse},
                                                 {"random", simt::Order::kRandom},
                                                 {"skew", simt::Order::kSkew}});
    simt::options().seed = seed;
    fake::Options options;
    options.policy = choice<fake::Policy>("SLUICE_EMULATION_POLICY", "random",
                                          {{"eager", fake::Policy::kEager},
                                           {"lazy", fake::Policy::kLazy},
                                           {"ahead", fake::Policy::kAhead},
                                           {"random", fake::Policy::kRandom}});
    options.seed = seed;
    fake::reset(options);
    on_user_stream = choice<bool>("SLUICE_EMULATION_STREAM", "default",
                                  {{"default", false}, {"user", true}});
  }
};
const Schedule& schedule() {
  static const Schedule made;
  return made;
}

/// Memory of one host thread on both sides, which grows and is kept.
class Bounce {
 public:
  ~Bounce() {
    (void)cudaFree(device_);
    (void)cudaFreeHost(host_);
  }
  Bounce() = default;
  Bounce(const Bounce&) = delete;
  Bounce& operator=(const Bounce&) = delete;

  void begin(std::size_t bytes) {
    used_ = 0;
    if (bytes <= bytes_) return;
    check("cudaFree", cudaFree(device_));
    check("cudaFreeHost", cudaFreeHost(host_));
    device_ = host_ = nullptr;
    bytes_ = 0;
    check("cudaMalloc", cudaMalloc(&device_, bytes));
    check("cudaHostAlloc", cudaHostAlloc(&host_, bytes, cudaHostAllocDefault));
    bytes_ = bytes;
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
    check("cudaMemcpyAsync",
          cudaMemcpyAsync(host_, source, bytes, cudaMemcpyDeviceToHost, stream));
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

/// The stream of this thread's calls: torch's current one, as it were.
cudaStream_t current_stream() {
  if (!schedule().on_user_stream) return nullptr;
  thread_local cudaStream_t stream = [] {
    cudaStream_t made = nullptr;
    check("cudaStreamCreateWithFlags", cudaStreamCreateWithFlags(&made, cudaStreamNonBlocking));
    return made;
  }();
  return stream;
}

}  // namespace

EngineDevice open_device(const std::string& torch_device) {
  require<ConfigError>(torch_device == "cpu", [&] {
    return "device: got \"" + torch_device + "\", expected \"cpu\": the emulation's cuda:0";
  });
  (void)schedule();
  EngineDevice opened{.device = make_cuda_device(0), .compute = nullptr};
  opened.compute = make_cuda_compute(*opened.device);
  return opened;
}

const char* cuda_kind() noexcept { return "emulated"; }

bool has_host_tier(const std::string& /*torch_device*/) noexcept { return true; }

void forward_tensors(Engine& engine, const ForwardArgs& args) {
  thread_local Bounce bounce;
  const auto entries = static_cast<std::size_t>(args.num_tokens * args.top_k);
  const auto hidden = static_cast<std::size_t>(engine.store().layer(args.layer).layout.hidden);
  const std::size_t rows =
      static_cast<std::size_t>(args.num_tokens) * hidden * element_bytes(args.activations);
  const std::size_t ids = entries * sizeof(std::int64_t);
  const std::size_t weights = entries * element_bytes(args.weights_dtype);
  const cudaStream_t stream = current_stream();
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
  thread_local Bounce bounce;
  const cudaStream_t stream = current_stream();
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
