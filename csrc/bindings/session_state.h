#pragma once

#include <sys/types.h>

#include <atomic>
#include <cstdint>
#include <exception>
#include <map>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "base/mutex.h"
#include "bindings/bindings.h"
#include "bindings/bridge.h"
#include "engine/engine.h"

namespace sluice::bindings {

/// A Python object that may be let go of on any thread: it takes the GIL for that.
using SharedPyObject = std::shared_ptr<py::object>;
[[nodiscard]] SharedPyObject share(py::object object);

/// One layer's gate as Python gave it; null callbacks are absent.
struct GateSettings {
  GateSpec spec;
  SharedPyObject gate_callback;
  SharedPyObject post_callback;
};

/// One engine and what ties it to Python: callbacks, the errors that forwards left, the process.
///
/// Thread safety: every member. Nothing but `take_error` and the destructor of a kept Python error
/// needs the GIL, and whoever holds it must not call `forward`, `drain` or `close`.
/// Errors: every member but `close` and `process_id` raises SluiceError in a forked child: the
/// threads of its engine do not exist there. The destructor leaks the engine there for that reason.
class SessionState {
 public:
  SessionState(std::shared_ptr<const ExpertStore> store, const std::string& torch_device,
               EngineOptions options, std::vector<GateSettings> gates, bool nvtx);
  ~SessionState();
  SessionState(const SessionState&) = delete;
  SessionState& operator=(const SessionState&) = delete;

  /// 0, or 1 with the error kept for this thread's `take_error`.
  [[nodiscard]] std::int32_t forward(const SluiceForwardCall& call) noexcept;
  /// The error of the calling thread's last forward, once; null if there is none.
  [[nodiscard]] std::exception_ptr take_error();

  /// The engine, for every other call.
  [[nodiscard]] Engine& engine() const;
  /// The engine's numbers with the degradations that happen on this side.
  [[nodiscard]] EngineStats stats() const;
  /// Idempotent; does nothing in a forked child. Errors: SluiceError inside of its own forward.
  void close();
  [[nodiscard]] bool closed() const noexcept { return closed_.load(); }
  [[nodiscard]] bool is_inherited() const noexcept;
  /// What a forked child is told.
  [[nodiscard]] std::exception_ptr inherited_error() const;

 private:
  [[nodiscard]] LayerSpec make_layer(const GateSettings& settings);
  [[nodiscard]] ExpertCallback make_callback(const SharedPyObject& fn);
  [[nodiscard]] ForwardArgs checked(const SluiceForwardCall& call) const;
  [[nodiscard]] int gemm(const GemmCall& call) noexcept;
  [[nodiscard]] bool interrupted() noexcept;
  /// Keeps `error` for this thread unless an earlier cause of the same forward is there.
  void keep_error(std::exception_ptr error) EXCLUDES(mu_);

  pid_t process_id_;
  const std::string torch_device_;
  std::atomic<bool> closed_{false};
  std::atomic<std::int64_t> reference_gemm_calls_{0};
  std::atomic<std::int64_t> python_gemm_calls_{0};
  Mutex mu_;
  std::map<std::thread::id, std::exception_ptr> errors_ GUARDED_BY(mu_);
  std::unique_ptr<Engine> engine_;  // last: its threads are gone before what they use
};

}  // namespace sluice::bindings
