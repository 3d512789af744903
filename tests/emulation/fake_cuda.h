#pragma once

#include <cuda_runtime_api.h>

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

/// A CUDA runtime without a GPU: what tests may ask of it and do to it.
///
/// It implements the prototypes of cuda_runtime_api.h, so the product's host code is compiled
/// against the real header and linked against this instead of cudart; a call it does not know fails
/// to link. Kernels run on the SIMT core (simt.h). Streams are queues, and one *step* is one chunk
/// of a copy, one batch of blocks or one event. Steps run only inside API calls, on the calling
/// thread, as late and as mixed as the events between the streams allow: with one host thread the
/// same seed is the same interleaving.
///
/// Thread safety: everything here may be called from any thread but `reset`, which wants no other
/// thread inside a call.
namespace fake {

/// Which queued work runs first.
///
/// `kLazy` and `kAhead` are the deterministic pair: what one hides the other shows.
enum class Policy {
  kEager,   ///< everything at the call that queues it: hides every ordering bug
  kLazy,    ///< only what the awaited work depends on: finds a missing wait for a *ready* event
  kAhead,   ///< streams that nobody waits for first: finds a missing wait for a *last-use* event
  kRandom,  ///< any runnable stream, by seed
};

/// What every device here says of itself. An sm_90, with few multiprocessors: plans stay small.
struct DeviceModel {
  int compute_major = 9;
  int compute_minor = 0;
  int num_multiprocessors = 2;
  std::size_t shared_bytes_per_block_optin = 227 * 1024;
  std::size_t shared_bytes_per_multiprocessor = 228 * 1024;
  std::size_t l2_bytes = std::size_t{50} << 20;
  /// The architecture that loaded code was compiled for: below the device's where it was
  /// translated from PTX. 0: the device's.
  int code_version = 0;
};

struct Options {
  Policy policy = Policy::kRandom;
  std::uint64_t seed = 1;
  /// One step of a copy.
  std::size_t chunk_bytes = 4096;
  /// Device pages are closed to host code unless device work runs or a `Peek` is alive.
  bool protect = true;
  int num_devices = 1;
  /// A process forked from one that has made a call is refused every one, as in CUDA. Not where
  /// tests fork in order to die.
  bool forks_lose_devices = false;
  /// Memory of each device: beyond it cudaMalloc refuses.
  std::size_t device_bytes = std::size_t{1} << 30;
  /// What cudaHostAlloc and cudaHostRegister grant together.
  std::size_t pinned_bytes = std::size_t{1} << 30;
  /// Priorities a stream may have; 1: all streams are equal. Copies and kernels ignore them.
  int num_priorities = 1;
  DeviceModel model = {};
  /// How long a device on which every block spins waits for a host thread that is not itself
  /// waiting for the device. Then the kernel fails: "the device waits for the host".
  std::chrono::milliseconds patience = std::chrono::seconds(5);
  /// Host threads run one at a time and change places, by seed, at every call here and at every
  /// lock and wait of base/mutex.h: the same seed is the same interleaving with several of them,
  /// too. Off under the thread sanitizer's tests, which want them at once.
  bool baton = false;
  /// How long its holder may compute, or wait where the baton cannot see it, before others go on.
  std::chrono::milliseconds baton_patience = std::chrono::milliseconds(500);
};

/// Frees everything, forgets errors, injections and the log, and starts anew. Handles and pointers
/// from before are refused from then on. Kernels' opt-in attributes stay, as loaded code does.
void reset(const Options& options = {});
[[nodiscard]] const Options& options();

/// With the baton: the caller's next call returns once that many threads, which it is about to
/// start, have made their first one. When they begin is the system's choice otherwise.
void expect_threads(int num_threads);
/// With the baton: how often its holder waited by other means than base's until patience ended.
/// Such a run may not repeat.
[[nodiscard]] int batons_lost();
/// With the baton: the caller is about to wait by other means (a join) and does not keep others.
class Outside {
 public:
  Outside();
  ~Outside();
  Outside(const Outside&) = delete;
  Outside& operator=(const Outside&) = delete;
};

/// Every call that is emulated, in the log and for injection.
enum class Api {
  kMalloc,
  kFree,
  kHostAlloc,
  kFreeHost,
  kHostRegister,
  kHostUnregister,
  kMemGetInfo,
  kPointerGetAttributes,
  kMemcpyAsync,
  kMemsetAsync,
  kStreamCreate,  ///< with flags, and with priority
  kStreamDestroy,
  kStreamSynchronize,
  kStreamQuery,
  kStreamWaitEvent,
  kStreamIsCapturing,
  kStreamBeginCapture,
  kStreamEndCapture,
  kThreadExchangeStreamCaptureMode,
  kEventCreate,
  kEventDestroy,
  kEventRecord,
  kEventQuery,
  kEventSynchronize,
  kEventElapsedTime,
  kLaunchKernel,
  kLaunchHostFunc,
  kFuncSetAttribute,
  kFuncGetAttributes,
  kGraphInstantiate,
  kGraphLaunch,
  kGraphDestroy,
  kGraphExecDestroy,
  kSetDevice,
  kGetDevice,
  kGetDeviceCount,
  kDeviceGetAttribute,
  kDeviceGetStreamPriorityRange,
  kDeviceSynchronize,
  kRuntimeGetVersion,
  kDriverGetVersion,
  kGetLastError,
  kPeekAtLastError,
};
inline constexpr int kNumApis = static_cast<int>(Api::kPeekAtLastError) + 1;
/// As CUDA spells it: "cudaMalloc".
[[nodiscard]] const char* name(Api api);

/// After `calls` more calls of `api`, the next one fails with `error`, once. Calls that give
/// something back give it back all the same. `sticky`: the current device is lost with it, as
/// after a fault. A test sweeps `calls` until nothing was `injected`.
void fail_after(Api api, int calls, cudaError_t error, bool sticky = false);
/// The device that does the next but `steps` step is lost in it: an asynchronous error.
void fault_after_steps(int steps, cudaError_t error);
/// How many of these have struck since `reset`.
[[nodiscard]] int injected();

/// Why the last call was refused, or what the device died of: call, allocation, kernel, thread.
[[nodiscard]] std::string last_failure();
/// What CUDA lets pass and we do not: freeing pinned memory under a queued copy, a blocking stream
/// of the tier's, a pointer of another device. Empty after every clean test.
[[nodiscard]] std::vector<std::string> findings();

/// One call, in the order in which they took the runtime's lock.
struct Call {
  Api api;
  cudaStream_t stream;  ///< null where the call has none
  int thread;           ///< numbered by first call
  bool host_waited;     ///< by its contract the call returns behind device work
};
/// Every call since `reset`, up to a million of them.
[[nodiscard]] std::vector<Call> call_log();
/// The length of the log: a mark to count from.
[[nodiscard]] std::size_t num_calls();
/// The calls since that mark in which the host waited for the device, by name.
[[nodiscard]] std::vector<std::string> host_waits_since(std::size_t mark);

struct Stats {
  // Alive now.
  std::size_t device_bytes = 0;
  int device_allocations = 0;
  std::size_t pinned_bytes = 0;
  int pinned_allocations = 0;
  std::size_t registered_bytes = 0;
  int registered_ranges = 0;
  int streams = 0;
  int events = 0;
  int graphs = 0;  ///< and executable ones
  int queued = 0;  ///< operations that wait in streams
  // Since `reset`.
  std::size_t peak_device_bytes = 0;
  std::size_t peak_pinned_bytes = 0;  ///< with registered ranges
  std::uint64_t copies = 0;
  std::uint64_t copied_bytes = 0;
  std::uint64_t pageable_copies = 0;  ///< law 5: counted, never silent
  std::uint64_t launches = 0;
  std::uint64_t early_prologues = 0;  ///< grids that began before the one ahead of them was done
  std::uint64_t steps = 0;
  int blocking_streams = 0;
};
[[nodiscard]] Stats stats();

/// While alive the host may look at device memory, and work runs on as before. Tests only.
class Peek {
 public:
  Peek();
  ~Peek();
  Peek(const Peek&) = delete;
  Peek& operator=(const Peek&) = delete;
};

}  // namespace fake
