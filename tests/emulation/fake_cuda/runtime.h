#pragma once

#include <cuda_runtime_api.h>
#include <sys/types.h>

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <deque>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <random>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

#include "tests/emulation/fake_cuda.h"
#include "tests/emulation/fake_cuda/memory.h"

// The inside of the fake runtime. cuda_runtime_api.h leaves the structs behind its handles
// incomplete; here they are what the handles point to.

namespace fake {

class Session;

/// When one operation of a stream is done. Events and waiters share it; it outlives both.
struct Record {
  bool done = false;
  /// Where the operation is queued. Valid until it is done.
  CUstream_st* stream = nullptr;
  /// Virtual time at which it was done: steps so far, a microsecond each.
  std::uint64_t done_us = 0;
};

/// One operation in a stream's queue, or in a captured graph.
class Work {
 public:
  enum class Progress {
    kMore,  ///< something was done, and more is left
    kDone,
    kBlocked,   ///< waits for an event; nothing was done
    kSpinning,  ///< waits for what another stream or the host writes; nothing was done
    kFailed,    ///< the device is lost, and with it the queue that this was in
  };
  virtual ~Work() = default;
  virtual Progress step(Session& session, CUstream_st& stream) = 0;
  /// The same operation, not begun: what a graph launch queues.
  [[nodiscard]] virtual std::unique_ptr<Work> clone() const = 0;
  /// For reports: "copy of 4096 bytes to cuda:0 allocation 1".
  [[nodiscard]] virtual std::string name() const = 0;
  /// Whether the head of a queue could step now.
  [[nodiscard]] virtual bool blocked() const { return false; }
  /// What an event wait waits for; null for everything else.
  [[nodiscard]] virtual const Record* awaited() const { return nullptr; }
  /// Runs ahead of the grid before it in the stream, as far as it may (dependent launches).
  /// False when there is nothing (more) to run ahead.
  virtual bool step_early(Session& /*session*/, CUstream_st& /*stream*/) { return false; }
  /// Whether a dependent launch may begin while this one runs.
  [[nodiscard]] virtual bool is_grid() const { return false; }
  /// Whether a step would read or write the allocation.
  [[nodiscard]] virtual bool uses(const Allocation& /*allocation*/) const { return false; }

  const std::shared_ptr<Record> record = std::make_shared<Record>();
};

struct Device {
  int ordinal = 0;
  /// What the device died of; every later call on it returns this.
  cudaError_t fault = cudaSuccess;
  CUstream_st* legacy = nullptr;
};

/// What a thread has of its own in CUDA.
struct Thread {
  Thread();
  ~Thread();
  int index = 0;
  int device = 0;
  cudaError_t last_error = cudaSuccess;
  /// How much this thread is held back by captures.
  cudaStreamCaptureMode capture_mode = cudaStreamCaptureModeGlobal;
  std::uint64_t epoch = 0;  ///< of the `reset` that the three above belong to
  bool in_host_function = false;
};
[[nodiscard]] Thread& this_thread();

struct Capture;

struct Injection {
  int calls_left = 0;
  cudaError_t error = cudaSuccess;
  bool sticky = false;
};

/// All state, behind one lock. Made once and never destroyed: CUDA handles may be given back by
/// static destructors.
struct Runtime {
  static Runtime& get();

  std::mutex mutex;
  /// Threads that want the lock: whoever drives the device lets them in between steps.
  std::atomic<int> num_entering = 0;
  /// Signalled at every call and whenever work was done.
  std::condition_variable changed;
  std::uint64_t activity = 0;

  Options options;
  std::uint64_t epoch = 0;
  std::mt19937_64 rng;
  // Of kRandom: who runs ahead, and for about how many steps. The seed chooses the latter, for
  // scenarios of a hundred steps and of thousands.
  CUstream_st* favourite = nullptr;
  std::uint64_t favour_period = 1;
  Memory memory;
  std::vector<Device> devices;
  // Streams and events stay allocated for the life of the process, so that an old handle is refused
  // and never mistaken for a new one at the same address.
  std::vector<std::unique_ptr<CUstream_st>> streams;
  std::unordered_map<cudaEvent_t, std::unique_ptr<CUevent_st>> events;
  std::vector<std::unique_ptr<CUstream_st>> old_streams;
  std::vector<std::unique_ptr<CUevent_st>> old_events;
  std::unordered_map<cudaGraph_t, std::unique_ptr<CUgraph_st>> graphs;
  std::unordered_map<cudaGraphExec_t, std::unique_ptr<CUgraphExec_st>> executables;
  std::vector<std::weak_ptr<Capture>> captures;
  /// What a lost device still held, kept while its steps are on the stack.
  std::vector<std::unique_ptr<Work>> graveyard;

  std::map<Api, Injection> injections;
  std::optional<Injection> step_fault;
  int num_injected = 0;
  int num_handles = 0;  ///< numbers streams
  std::string last_failure;
  std::vector<std::string> findings;
  std::vector<Call> log;
  Stats counts;  ///< the "since reset" half
  /// Opted in, by kernel and device. Outlives `reset`, as loaded code does.
  std::map<std::pair<const void*, int>, std::size_t> shared_bytes_of;

  pid_t owner = 0;  ///< the process that made the devices
  int num_drivers = 0;
  int num_threads = 0;  ///< alive that have called
  int num_waiting = 0;  ///< of them, asleep here until something changes
  int next_thread = 0;
};

/// One API call on one thread: holds the lock and knows what the call has to return.
class Session {
 public:
  Session(Api api, cudaStream_t handle);
  ~Session();
  Session(const Session&) = delete;
  Session& operator=(const Session&) = delete;

  Runtime& runtime;
  Thread& thread;
  std::unique_lock<std::mutex> lock;

  [[nodiscard]] Device& device() { return runtime.devices.at(thread.device); }
  /// Notes "cudaMalloc: why" as the last failure and returns `error`.
  cudaError_t fail(cudaError_t error, const std::string& why);
  /// Notes what CUDA would let pass.
  void report(const std::string& finding);
  /// The host waits in this call for device work; for the log.
  void note_host_wait();
  /// The stream of a handle on which work may be queued; else the error is in `*error`.
  CUstream_st* stream(cudaStream_t handle, cudaError_t* error);
  CUevent_st* event(cudaEvent_t handle, cudaError_t* error);

  // --- scheduler.cc
  /// Queues work behind what the stream holds, or appends it to the stream's capture. Under eager
  /// and random, runs what they run at a call.
  cudaError_t push(CUstream_st& stream, std::unique_ptr<Work> work);
  /// Steps until all of these are done, or a device that holds one is lost, or nothing can run.
  void drive(std::vector<std::shared_ptr<Record>> records);
  /// At most one step towards `record`.
  void step_towards(const Record& record);
  /// The newest operation of every stream of a device.
  [[nodiscard]] std::vector<std::shared_ptr<Record>> tails(int device) const;
  /// The device is lost: its queues are emptied, and its calls fail from now on.
  void lose(Device& lost, cudaError_t error, const std::string& why);

  Api api;
  /// What the call has to return whatever it does: an injection, a lost device, a wrong place.
  cudaError_t refusal = cudaSuccess;
  /// In a forked child: what the call would give back is the parent's.
  bool is_forked = false;

 private:
  void enter(cudaStream_t handle);
  bool run_one(const Record* target);
  CUstream_st* pick(const Record* target);
  Work::Progress step(CUstream_st& stream);
  bool sleep_until_changed();
  void let_others_in();
  void clear_stalls();

  friend class Driving;
  std::optional<std::size_t> log_index_;
};

namespace detail {
/// What the emulation has to know of a call before it runs.
struct ApiTraits {
  const char* name;
  /// Takes something back, also from a lost device and when a failure is injected.
  bool gives_back = false;
  bool needs_device = true;
  /// Returns what the current device died of.
  bool checks_fault = true;
  /// Would end a capture that the calling thread's mode and the capture's forbid it in.
  bool unsafe_in_capture = false;
};
[[nodiscard]] const ApiTraits& traits(Api api);
cudaError_t leave(Session& session, cudaError_t error);
}  // namespace detail

/// Runs `body(session)` as the call `api`. Calls that give something back do so whatever happens.
template <class Body>
cudaError_t call(Api api, cudaStream_t handle, Body&& body) {
  Session session(api, handle);
  cudaError_t error = session.refusal;
  if (error == cudaSuccess || (detail::traits(api).gives_back && !session.is_forked)) {
    const cudaError_t own = body(session);
    if (error == cudaSuccess) error = own;
  }
  return detail::leave(session, error);
}

/// The devices of the options; `reset` and the first call make them.
void make_devices(Runtime& runtime);
/// Text of a pointer for messages.
[[nodiscard]] std::string hex(const void* pointer);

/// A wait for `record`, for the queue of another stream.
[[nodiscard]] std::unique_ptr<Work> make_wait(std::shared_ptr<Record> record);
/// What a query of `record` answers: one step nearer, and after a few in a row once it is done.
[[nodiscard]] bool answer_query(Session& session, const std::shared_ptr<Record>& record,
                                int* unanswered);
/// What work about to be queued on `stream` waits for because of the default stream's order.
[[nodiscard]] std::vector<std::unique_ptr<Work>> legacy_waits(Session& session,
                                                              const CUstream_st& stream);
/// Ends the captures that the call must not run beside; the code to return, or success.
cudaError_t refuse_in_capture(Session& session, const detail::ApiTraits& traits);
/// Appends to the capture of the stream.
cudaError_t append(Session& session, CUstream_st& stream, std::unique_ptr<Work> work);

}  // namespace fake

struct CUstream_st {
  int index = 0;
  int device = 0;
  bool blocking = false;  ///< ordered with handle 0 of its device
  bool legacy = false;    ///< is handle 0
  bool alive = true;
  int unanswered_queries = 0;
  std::deque<std::unique_ptr<fake::Work>> queue;
  std::shared_ptr<fake::Record> tail;  ///< of the newest operation, done or not
  std::shared_ptr<fake::Capture> capture;
  bool running_host_function = false;  ///< its head runs without the lock
  bool stalled = false;                ///< spun since anything was last done

  [[nodiscard]] std::string name() const;
  [[nodiscard]] bool idle() const { return queue.empty(); }
};

struct CUevent_st {
  int device = 0;
  bool timing = false;
  bool alive = true;
  int unanswered_queries = 0;
  std::shared_ptr<fake::Record> latest;  ///< of the newest cudaEventRecord; null before
  /// That record was captured, not queued: no stream will ever reach it.
  bool in_capture = false;
  std::weak_ptr<fake::Capture> captured;
};
