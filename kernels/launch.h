#pragma once

#include <cuda_runtime_api.h>
#if !defined(SLUICE_EMULATE)
#include <cuda_runtime.h>
#endif

#include <array>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <mutex>
#include <tuple>
#include <type_traits>
#include <utility>

// The only way a kernel starts. `<<<>>>` appears nowhere: g++ cannot parse it, and the tests
// compile every .cu with g++ and SLUICE_EMULATE to run it without a GPU.

namespace sluice {

/// What a plan decides about one launch.
///
/// `overlap_previous` lets the grid begin before the one ahead of it in the stream has ended
/// (programmatic dependent launch): its kernel must wait, with `grid_dependency_wait` of ptx.h,
/// before it touches what that grid wrote. It asks nothing of the grid ahead. Only where
/// `supports_dependent_launch` (dependent_launch.h).
struct LaunchShape {
  dim3 grid;
  dim3 block;
  /// Dynamic shared memory. A kernel is opted in at its first launch on a device that wants more
  /// than the ones before.
  std::size_t shared_bytes = 0;
  cudaStream_t stream = nullptr;
  bool overlap_previous = false;
};

namespace launch_detail {

// One kernel on one device and the dynamic shared memory it may use there.
struct SharedGrant {
  std::atomic<std::uint64_t> kernel_and_device = 0;
  std::atomic<std::size_t> bytes = 0;
};

// The runtime keeps this attribute with the loaded code, for the life of the process: so does its
// copy here, which turns the call into one probe from the second launch on. A kernel past the last
// entry asks every time.
inline std::array<SharedGrant, 512> shared_grants;
inline std::mutex shared_grants_mutex;

// The entry of `key`, or the free one where it belongs, or null in a full table.
inline SharedGrant* find_shared_grant(std::uint64_t key) noexcept {
  const std::size_t start = static_cast<std::size_t>((key * 0x9E3779B97F4A7C15u) >> 32);
  for (std::size_t probe = 0; probe < shared_grants.size(); ++probe) {
    SharedGrant& entry = shared_grants[(start + probe) % shared_grants.size()];
    const std::uint64_t found = entry.kernel_and_device.load(std::memory_order_acquire);
    if (found == key || found == 0) return &entry;
  }
  return nullptr;
}

// Unasked a kernel has 48 KiB less its static bytes (cuda.h,
// CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES), which are not known here: so it is asked for
// any.
inline cudaError_t allow_shared_bytes(const void* kernel, std::size_t bytes) {
  if (bytes == 0) return cudaSuccess;
  int device = 0;
  if (const cudaError_t error = cudaGetDevice(&device); error != cudaSuccess) return error;
  // Code lies below 2^56 on every platform we build for.
  const std::uint64_t key =
      reinterpret_cast<std::uintptr_t>(kernel) | (static_cast<std::uint64_t>(device) << 56);
  const auto granted = [&](const SharedGrant* entry) {
    return entry != nullptr && entry->kernel_and_device.load(std::memory_order_acquire) == key &&
           entry->bytes.load(std::memory_order_acquire) >= bytes;
  };
  if (granted(find_shared_grant(key))) return cudaSuccess;

  // The attribute is a maximum that a smaller request would lower under another thread's launch.
  const std::lock_guard<std::mutex> lock(shared_grants_mutex);
  SharedGrant* const entry = find_shared_grant(key);
  if (granted(entry)) return cudaSuccess;
  const cudaError_t error = cudaFuncSetAttribute(
      kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes));
  if (error == cudaSuccess && entry != nullptr) {
    entry->bytes.store(bytes, std::memory_order_release);
    entry->kernel_and_device.store(key, std::memory_order_release);
  }
  return error;
}

#if defined(SLUICE_EMULATE)
// Queues a grid on the fake runtime, which defines it (the tests' fake_cuda/launches.cc). `body`
// runs one thread of the kernel on the copy of its arguments.
cudaError_t enqueue(const char* name, const LaunchShape& shape, const void* kernel,
                    void (*body)(const void* arguments), std::shared_ptr<const void> arguments,
                    std::size_t argument_bytes);
#endif

}  // namespace launch_detail

/// Starts `kernel` on `shape.stream` of the current device, and does not wait for it.
///
/// Arguments are copied at the call. Product kernels take one `__grid_constant__` struct.
/// `name` is for the reports of the emulation: a literal.
///
/// Thread safety: any thread. Errors: the runtime's code; the caller names the kernel in its throw.
template <class... P, class... A>
[[nodiscard]] cudaError_t launch(const char* name, const LaunchShape& shape, void (*kernel)(P...),
                                 A&&... arguments) {
  static_assert(sizeof...(P) == sizeof...(A), "one argument for each parameter of the kernel");
  static_assert((std::is_trivially_copyable_v<P> && ...), "arguments travel as bytes");
  // CUDA 12.1 on; 4 KiB before, and no compiler says so.
  static_assert((sizeof(P) + ... + 0) <= 32'764, "kernel parameters hold at most 32,764 bytes");
  const void* const code = reinterpret_cast<const void*>(kernel);
  const cudaError_t refused = launch_detail::allow_shared_bytes(code, shape.shared_bytes);
  if (refused != cudaSuccess) return refused;
#if defined(SLUICE_EMULATE)
  // A function pointer and bytes, not a closure on the heap: a kernel may read its arguments, and
  // is reported when it reads the host's heap.
  struct Call {
    void (*kernel)(P...);
    std::tuple<P...> arguments;
  };
  auto call = std::make_shared<const Call>(Call{kernel, {static_cast<P>(arguments)...}});
  const auto body = [](const void* opaque) {
    const Call& packed = *static_cast<const Call*>(opaque);
    std::apply(packed.kernel, packed.arguments);
  };
  return launch_detail::enqueue(name, shape, code, body, std::move(call), sizeof(Call));
#else
  (void)name;
  cudaLaunchAttribute attribute = {};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = shape.grid;
  config.blockDim = shape.block;
  config.dynamicSmemBytes = shape.shared_bytes;
  config.stream = shape.stream;
  config.attrs = &attribute;
  config.numAttrs = shape.overlap_previous ? 1 : 0;
  return cudaLaunchKernelEx(&config, kernel, std::forward<A>(arguments)...);
#endif
}

}  // namespace sluice
