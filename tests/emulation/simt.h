#pragma once

// CUDA kernels on a CPU, for tests. Every .cu is compiled as C++ with `-DSLUICE_EMULATE -include`
// of this file; the README beside it says what that shows and what it cannot.

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>

#include <vector_functions.h>
#include <vector_types.h>

#include "tests/emulation/intrinsics.h"
#include "tests/emulation/registry.h"

namespace simt {

/// Which thread runs next. All four are needed: a missing barrier between a writer and a reader is
/// invisible to one of forward and reverse, and one at the end of a loop to everything but skew.
enum class Order {
  kForward,
  kReverse,
  kRandom,
  /// One warp runs until it can go no further before any other moves.
  kSkew,
};

/// How an mma adds its sixteen products. Tensor cores do not follow IEEE, so tests run under two.
enum class MmaModel {
  kFp32InOrder,
  /// Eight products and the accumulator exactly (fp64), then one rounding; twice.
  kFp64PerEight,
  /// The same, rounded towards zero.
  kFp64PerEightTruncated,
};

struct Options {
  Order order = Order::kForward;
  std::uint64_t seed = 1;
  /// Blocks that run together. Take it from the plan where blocks wait for each other.
  int resident = 2;
  /// A cp.async lands at its own wait, and its target is poison until then; false: at once.
  bool late_cp_async = true;
  MmaModel mma = MmaModel::kFp32InOrder;
};

/// Read by grids when they step.
[[nodiscard]] Options& options();

struct Counters {
  std::uint64_t switches = 0;
  std::uint64_t barriers = 0;
  /// Of warps, not of lanes.
  std::uint64_t collectives = 0;
  std::uint64_t mma = 0;
  std::uint64_t cp_async = 0;
  /// Accesses of kernels that were looked at; zero in a build that does not check them.
  std::uint64_t checked_accesses = 0;
};

/// Since the start of the process; tests set it to {}.
[[nodiscard]] Counters& counters();

/// Whether this build looks at every access of a kernel.
[[nodiscard]] bool checked();

struct GridState;

/// One kernel launch, run in steps so that copies and other kernels can come between them.
///
/// `body(args)` runs one thread of the kernel; it is a plain function, and `args` bytes that a
/// kernel may read, because a closure would look like the host's heap to the checks. A failed check
/// ends the grid: threads are dropped where they stand, so a kernel must own nothing.
///
/// Thread safety: none, and one grid steps at a time in the whole process; any thread may take the
/// next step.
class Grid {
 public:
  Grid(const char* name, dim3 grid, dim3 block, std::size_t shared_bytes,
       void (*body)(const void* args), std::shared_ptr<const void> args, std::size_t arg_bytes);
  ~Grid();
  Grid(const Grid&) = delete;
  Grid& operator=(const Grid&) = delete;

  enum class Step {
    /// Some blocks ended, or ran until all of them spin; there is more to do.
    kProgress,
    kDone,
    /// See `error()`; the grid never runs again.
    kFailed,
    /// Nothing can run before the previous grid of the stream is done (`grid_dependency_wait`).
    kBlockedOnDependency,
    /// Every thread that could run polls memory, and nothing has changed since the last step.
    kSpinning,
  };
  /// Runs a batch of `options().resident` blocks until it ends, spins, or must wait.
  Step step();

  /// Programmatic dependent launch: false while the grid ahead in the stream is unfinished.
  void set_dependency_done(bool done);
  /// The device whose memory the kernel may touch; 0 unless set.
  void set_device(int device);

  /// "kernel block (1,0,0) thread 33: what happened"; empty unless `step` gave kFailed.
  [[nodiscard]] const std::string& error() const;
  [[nodiscard]] const char* name() const;

 private:
  std::unique_ptr<GridState> state_;
};

/// Gives the calling thread the alternate signal stack on which faults are caught. Cheap when it
/// has one; `Grid::step` calls it, other threads that may touch device memory must.
void prepare_thread();

/// Called when code of the host faults at an address the registry knows, outside of the signal
/// handler, on a stack of its own. If it returns, the default report follows: "HOST CODE touches
/// device memory: …" on standard error, and the process exits with 87.
using HostFaultHandler = void (*)(const void* address);
void set_host_fault_handler(HostFaultHandler handler);

}  // namespace simt
