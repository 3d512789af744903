#include <cuda_runtime_api.h>

#include <cstdio>
#include <deque>
#include <exception>
#include <string>
#include <utility>
#include <vector>

#include "base/error.h"
#include "base/log_ring.h"
#include "base/mutex.h"
#include "device/device.h"
#include "device/host_pages.h"

namespace sluice {
namespace {

std::string describe(cudaError_t code) {
  return std::string(cudaGetErrorName(code)) + " (" + std::to_string(static_cast<int>(code)) +
         ": " + cudaGetErrorString(code) + ")";
}

/// Errors that say no to one call and leave the context as it was. Every other one is kept.
bool is_refusal(cudaError_t code) {
  return code == cudaErrorMemoryAllocation || code == cudaErrorInvalidValue ||
         code == cudaErrorHostMemoryAlreadyRegistered || code == cudaErrorNotSupported ||
         code == cudaErrorInvalidResourceHandle || code == cudaErrorStreamCaptureUnsupported;
}

/// The device that the calling thread works on, as far as we have entered it; −1: none.
thread_local int entered_ordinal = -1;

class CudaDevice final : public Device {
 public:
  explicit CudaDevice(int ordinal) : ordinal_(ordinal), name_("cuda:" + std::to_string(ordinal)) {
    int count = 0;
    const cudaError_t code = cudaGetDeviceCount(&count);
    if (code != cudaSuccess) (void)cudaGetLastError();  // it is reported here, once
    require<DeviceError>(code != cudaErrorInitializationError, [&] {
      return "device " + name_ + ": got " + describe(code) +
             " from cudaGetDeviceCount, expected a process that was not forked from one that had "
             "used CUDA; start it by spawn";
    });
    require<DeviceError>(code == cudaSuccess, [&] {
      return "device " + name_ + ": got " + describe(code) +
             " from cudaGetDeviceCount, expected a working driver; see nvidia-smi, or keep the "
             "model on the CPU";
    });
    require<DeviceError>(ordinal >= 0 && ordinal < count, [&] {
      return "device " + name_ + ": got " + std::to_string(count) +
             " CUDA devices, expected one of that number; choose another";
    });
    const DeviceScope here(*this);
    traits_ = {.name = name_, .slots_in_ram = false};
    const auto attribute = [&](cudaDeviceAttr which) {
      int value = 0;
      check("cudaDeviceGetAttribute", cudaDeviceGetAttribute(&value, which, ordinal_));
      return value;
    };
    traits_.compute_capability = 10 * attribute(cudaDevAttrComputeCapabilityMajor) +
                                 attribute(cudaDevAttrComputeCapabilityMinor);
    traits_.num_multiprocessors = attribute(cudaDevAttrMultiProcessorCount);
    traits_.shared_bytes_per_block =
        static_cast<std::size_t>(attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin));
    require<DeviceError>(traits_.compute_capability >= 80, [&] {
      return "device " + name_ + ": got compute capability " +
             std::to_string(traits_.compute_capability / 10) + "." +
             std::to_string(traits_.compute_capability % 10) +
             ", expected 8.0 or newer; keep the model on the CPU";
    });
    check("cudaStreamCreateWithFlags",
          cudaStreamCreateWithFlags(&copy_stream_, cudaStreamNonBlocking));
  }

  ~CudaDevice() override { close(); }

  void close() noexcept override EXCLUDES(mu_) {
    const DeviceScope here(*this);
    if (copy_stream_ != nullptr) {
      log_failure("cudaStreamDestroy", cudaStreamDestroy(std::exchange(copy_stream_, nullptr)));
    }
    const MutexLock lock(mu_);
    // All of them: an error may have kept some from coming back to the pool.
    for (Event& event : events_) {
      if (event.native == nullptr) continue;
      log_failure("cudaEventDestroy", cudaEventDestroy(std::exchange(event.native, nullptr)));
    }
  }

  [[nodiscard]] DeviceTraits traits() const override { return traits_; }

  // A device that cannot be entered refuses the calls that follow, which report it.
  ThreadState enter_thread() override {
    ThreadState before;
    if (cudaGetDevice(&before.device) == cudaSuccess && before.device != ordinal_) {
      (void)cudaSetDevice(ordinal_);
    }
    if (entered_ordinal == ordinal_) return before;
    cudaStreamCaptureMode mode = cudaStreamCaptureModeRelaxed;
    if (cudaThreadExchangeStreamCaptureMode(&mode) != cudaSuccess) {
      (void)cudaGetLastError();
      return before;
    }
    before.capture_mode = static_cast<int>(mode);
    before.entered = std::exchange(entered_ordinal, ordinal_);
    return before;
  }
  void leave_thread(const ThreadState& before) noexcept override {
    if (before.device >= 0 && before.device != ordinal_) (void)cudaSetDevice(before.device);
    if (before.capture_mode < 0) return;
    auto mode = static_cast<cudaStreamCaptureMode>(before.capture_mode);
    (void)cudaThreadExchangeStreamCaptureMode(&mode);
    entered_ordinal = before.entered;
  }

  [[nodiscard]] DeviceBuffer allocate_slab(std::size_t bytes) override {
    if (bytes == 0) return {};
    const DeviceScope here(*this);
    void* data = nullptr;
    const cudaError_t code = cudaMalloc(&data, bytes);
    if (code == cudaErrorMemoryAllocation) {
      (void)cudaGetLastError();
      const MemoryInfo memory = memory_info();
      throw CapacityError("slab on " + name_ + ": got a refusal for " + std::to_string(bytes) +
                          " bytes with " + std::to_string(memory.free_bytes) + " of " +
                          std::to_string(memory.total_bytes) +
                          " bytes free; lower device_memory, or free what else is on the device");
    }
    check("cudaMalloc", code);
    return {this, static_cast<std::byte*>(data), bytes, MemoryKind::kDevice};
  }

  [[nodiscard]] DeviceBuffer allocate_host(std::size_t bytes) override {
    if (bytes == 0) return {};
    std::byte* const pages = map_host_pages(bytes, "host memory", "lower host_memory");
    // Pages that a device reads may not move when either side writes behind a fork, and Linux
    // copies pinned ones at the fork itself: a child has no use for them.
    keep_from_children(pages, bytes);
    return {this, pages, bytes, MemoryKind::kHost};
  }

  [[nodiscard]] bool pin(DeviceBuffer& buffer) override {
    if (buffer.kind() != MemoryKind::kHost || buffer.bytes() == 0) return true;
    const DeviceScope here(*this);
    const cudaError_t code =
        cudaHostRegister(buffer.data(), buffer.bytes(), cudaHostRegisterPortable);
    if (is_refusal(code) || code == cudaErrorOperatingSystem) {
      (void)cudaGetLastError();
      log_ring().log(LogLevel::kWarning, "cudaHostRegister of " + std::to_string(buffer.bytes()) +
                                             " bytes: got " + describe(code) +
                                             "; copies from there go through staging");
      return false;
    }
    check("cudaHostRegister", code);
    set_kind(buffer, MemoryKind::kPinned);
    return true;
  }

  [[nodiscard]] MemoryInfo memory_info() override {
    const DeviceScope here(*this);
    std::size_t free_bytes = 0;
    std::size_t total_bytes = 0;
    check("cudaMemGetInfo", cudaMemGetInfo(&free_bytes, &total_bytes));
    return {.free_bytes = free_bytes, .total_bytes = total_bytes};
  }

  [[nodiscard]] StreamHandle copy_stream() override {
    return StreamHandle{reinterpret_cast<std::uintptr_t>(copy_stream_)};
  }

  void copy_async(std::byte* target, const std::byte* source, std::size_t bytes,
                  StreamHandle stream) override {
    enqueue_copy(target, source, bytes, cudaMemcpyHostToDevice, stream);
  }
  void read_async(std::byte* target, const std::byte* source, std::size_t bytes,
                  StreamHandle stream) override {
    enqueue_copy(target, source, bytes, cudaMemcpyDeviceToHost, stream);
  }

  [[nodiscard]] EventHandle record(StreamHandle stream) override {
    const DeviceScope here(*this);
    Event* const event = take_event();
    const cudaError_t code = cudaEventRecord(event->native, native(stream));
    if (code != cudaSuccess) give_event(event);
    check("cudaEventRecord", code);
    return EventHandle{reinterpret_cast<std::uintptr_t>(event)};
  }
  void wait(StreamHandle stream, EventHandle event) override {
    if (event == EventHandle{}) return;
    const DeviceScope here(*this);
    check("cudaStreamWaitEvent", cudaStreamWaitEvent(native(stream), pooled(event)->native, 0));
  }
  void synchronize(EventHandle event) override {
    if (event == EventHandle{}) return;
    const DeviceScope here(*this);
    check("cudaEventSynchronize", cudaEventSynchronize(pooled(event)->native));
  }
  [[nodiscard]] bool passed(EventHandle event) override {
    if (event == EventHandle{}) return true;
    const DeviceScope here(*this);
    const cudaError_t code = cudaEventQuery(pooled(event)->native);
    if (code == cudaErrorNotReady) return false;
    check("cudaEventQuery", code);
    return true;
  }
  void share(EventHandle event, int more) noexcept override EXCLUDES(mu_) {
    if (event == EventHandle{}) return;
    const MutexLock lock(mu_);
    pooled(event)->owners += more;
  }
  void release(EventHandle event) noexcept override {
    if (event != EventHandle{}) give_event(pooled(event));
  }
  [[nodiscard]] bool is_capturing(StreamHandle stream) override {
    const DeviceScope here(*this);
    cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
    const cudaError_t code = cudaStreamIsCapturing(native(stream), &status);
    // Said of the legacy stream while any other one of the thread captures.
    if (code == cudaErrorStreamCaptureImplicit) {
      (void)cudaGetLastError();
      return true;
    }
    check("cudaStreamIsCapturing", code);
    return status != cudaStreamCaptureStatusNone;
  }

 private:
  static cudaStream_t native(StreamHandle stream) {
    return reinterpret_cast<cudaStream_t>(static_cast<std::uintptr_t>(stream));
  }
  /// One of the pool; a handle is its address.
  struct Event {
    cudaEvent_t native = nullptr;
    int owners = 1;  // under mu_
  };
  static Event* pooled(EventHandle event) {
    return reinterpret_cast<Event*>(static_cast<std::uintptr_t>(event));
  }

  // What has broken the context is the cause of whatever fails behind it: the first one is told.
  void check(const char* call, cudaError_t code) EXCLUDES(mu_) {
    if (code == cudaSuccess) [[likely]]
      return;
    (void)cudaGetLastError();
    const std::string got = std::string(call) + " on " + name_ + ": got " + describe(code);
    if (is_refusal(code)) {
      throw DeviceError(got + ", expected success; the device works on", /*for_good=*/false);
    }
    const DeviceError error(got + ", expected success; the session has failed, make a new one");
    const MutexLock lock(mu_);
    if (!failure_) failure_ = std::make_exception_ptr(error);
    std::rethrow_exception(failure_);
  }
  void log_failure(const char* call, cudaError_t code) const noexcept {
    if (code == cudaSuccess) return;
    (void)cudaGetLastError();
    try {
      log_ring().log(LogLevel::kError, std::string(call) + " on " + name_ + ": got " +
                                           describe(code) + " while giving back");
    } catch (...) {  // no memory to say it
    }
  }

  void enqueue_copy(std::byte* target, const std::byte* source, std::size_t bytes,
                    cudaMemcpyKind kind, StreamHandle stream) {
    if (bytes == 0) return;
    const DeviceScope here(*this);
    check("cudaMemcpyAsync", cudaMemcpyAsync(target, source, bytes, kind, native(stream)));
  }

  Event* take_event() EXCLUDES(mu_) {
    {
      const MutexLock lock(mu_);
      if (!free_events_.empty()) {
        Event* const event = free_events_.back();
        free_events_.pop_back();
        event->owners = 1;
        return event;
      }
    }
    cudaEvent_t native = nullptr;
    check("cudaEventCreateWithFlags", cudaEventCreateWithFlags(&native, cudaEventDisableTiming));
    const MutexLock lock(mu_);
    events_.push_back({.native = native});
    if (free_events_.capacity() < events_.size()) {
      free_events_.reserve(2 * events_.size());  // giving back never allocates
    }
    return &events_.back();
  }
  void give_event(Event* event) noexcept EXCLUDES(mu_) {
    const MutexLock lock(mu_);
    if (--event->owners == 0) free_events_.push_back(event);
  }

  void free_buffer(std::byte* data, std::size_t bytes, MemoryKind kind) noexcept override {
    const DeviceScope here(*this);
    if (kind == MemoryKind::kDevice) {
      log_failure("cudaFree", cudaFree(data));
      return;
    }
    if (kind == MemoryKind::kPinned) log_failure("cudaHostUnregister", cudaHostUnregister(data));
    unmap_host_pages(data, bytes);
  }

  const int ordinal_;
  const std::string name_;
  DeviceTraits traits_;
  cudaStream_t copy_stream_ = nullptr;

  Mutex mu_;
  std::deque<Event> events_ GUARDED_BY(mu_);  // ever made; addresses stay
  std::vector<Event*> free_events_ GUARDED_BY(mu_);
  std::exception_ptr failure_ GUARDED_BY(mu_);
};

}  // namespace

std::unique_ptr<Device> make_cuda_device(int ordinal) {
  return std::make_unique<CudaDevice>(ordinal);
}

CudaDeviceFacts cuda_device_facts(int ordinal) {
  const auto check = [&](const char* call, cudaError_t code) {
    if (code == cudaSuccess) return;
    (void)cudaGetLastError();
    throw DeviceError(std::string(call) + " of cuda:" + std::to_string(ordinal) + ": got " +
                      describe(code) + ", expected one of the " +
                      std::to_string(num_cuda_devices()) + " CUDA devices; see nvidia-smi");
  };
  const auto attribute = [&](cudaDeviceAttr which) {
    int value = 0;
    check("cudaDeviceGetAttribute", cudaDeviceGetAttribute(&value, which, ordinal));
    return value;
  };
  // Function 0: what a GPU computes with; its sound is function 1.
  char address[32] = {};
  (void)std::snprintf(address, sizeof(address), "%04x:%02x:%02x.0",
                      static_cast<unsigned>(attribute(cudaDevAttrPciDomainId)),
                      static_cast<unsigned>(attribute(cudaDevAttrPciBusId)),
                      static_cast<unsigned>(attribute(cudaDevAttrPciDeviceId)));
  CudaDeviceFacts facts{.pci_address = address};
  facts.compute_capability = 10 * attribute(cudaDevAttrComputeCapabilityMajor) +
                             attribute(cudaDevAttrComputeCapabilityMinor);
  facts.num_multiprocessors = attribute(cudaDevAttrMultiProcessorCount);
  check("cudaDriverGetVersion", cudaDriverGetVersion(&facts.driver_cuda_version));
  return facts;
}

int num_cuda_devices() noexcept {
  int count = 0;
  if (cudaGetDeviceCount(&count) == cudaSuccess) return count;
  (void)cudaGetLastError();
  return 0;
}

}  // namespace sluice
