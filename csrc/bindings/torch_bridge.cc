#include "bindings/torch_bridge.h"

#include <sched.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <string>
#include <thread>

#include "base/dtype.h"
#include "base/error.h"
#include "bindings/bindings.h"
#include "bindings/registry.h"

namespace sluice::bindings {
namespace {

std::atomic<const SluiceTorchTable*> table{nullptr};
std::atomic<PyObject*> python_gemm{nullptr};  // written and dereferenced under the GIL only
pid_t loaded_in = 0;

/// Torch's pool, whose size is the user's (`torch.set_num_threads`).
class TorchFor final : public ParallelFor {
 public:
  explicit TorchFor(const SluiceTorchTable* torch) : torch_(torch) {}
  [[nodiscard]] int num_threads() const override { return torch_->num_threads(); }
  void run(std::int64_t count, std::int64_t grain, RangeFn fn) override {
    if (count <= 0) return;
    torch_->parallel_for(count, grain, &fn,
                         [](void* context, std::int64_t begin, std::int64_t end) {
                           (*static_cast<RangeFn*>(context))(begin, end);
                         });
  }

 private:
  const SluiceTorchTable* torch_;
};

void multiply_in_python(const GemmCall& call) {
  const py::gil_scoped_acquire gil;
  const auto fn = py::reinterpret_borrow<py::object>(python_gemm.load());
  require<InternalError>(static_cast<bool>(fn), [] { return "gemm: Python's function is gone"; });
  const auto address = [](const void* data) { return reinterpret_cast<std::uint64_t>(data); };
  fn(std::string(dtype_name(call.dtype)), call.m, call.n, call.k, address(call.a), address(call.b),
     address(call.c), call.ldc);
}

std::int32_t forward(const SluiceForwardCall* call) { return forward_by_handle(*call); }

constexpr SluiceCoreTable kCoreTable{kSluiceBridgeVersion, sizeof(SluiceCoreTable), &forward};

void set_torch_table(std::uint64_t address) {
  const auto* given = reinterpret_cast<const SluiceTorchTable*>(address);
  if (given != nullptr) {
    require<ConfigError>(given->version == kSluiceBridgeVersion &&
                             given->bytes == static_cast<std::int32_t>(sizeof(SluiceTorchTable)),
                         [&] {
                           return "torch table: got version " + std::to_string(given->version) +
                                  " with " + std::to_string(given->bytes) + " bytes, expected " +
                                  std::to_string(kSluiceBridgeVersion) + " with " +
                                  std::to_string(sizeof(SluiceTorchTable)) +
                                  "; _core and _ops are of different builds, reinstall sluice";
                         });
  }
  table.store(given, std::memory_order_release);
}

void set_python_gemm(const py::object& fn) {
  PyObject* given = fn.is_none() ? nullptr : fn.ptr();
  Py_XINCREF(given);
  Py_XDECREF(python_gemm.exchange(given));
}

int num_threads() {
  const SluiceTorchTable* torch = torch_table();
  return torch == nullptr ? affinity_threads() : torch->num_threads();
}

}  // namespace

const SluiceTorchTable* torch_table() noexcept { return table.load(std::memory_order_acquire); }

int affinity_threads() {
  cpu_set_t set;
  CPU_ZERO(&set);
  if (sched_getaffinity(0, sizeof(set), &set) == 0) return std::max(1, CPU_COUNT(&set));
  return std::max(1, static_cast<int>(std::thread::hardware_concurrency()));
}

std::unique_ptr<ParallelFor> make_parallel() {
  const SluiceTorchTable* torch = torch_table();
  if (torch != nullptr && getpid() == loaded_in) return std::make_unique<TorchFor>(torch);
  return make_thread_pool(affinity_threads());
}

GemmRoute gemm_route() noexcept {
  if (torch_table() != nullptr) return GemmRoute::kTorch;
  return python_gemm.load() != nullptr ? GemmRoute::kPython : GemmRoute::kReference;
}

void multiply(GemmRoute route, const GemmCall& call) {
  switch (route) {
    case GemmRoute::kTorch: {
      const SluiceTorchTable* torch = torch_table();
      const std::int32_t code = torch->gemm(static_cast<std::int32_t>(call.dtype), call.m, call.n,
                                            call.k, call.a, call.b, call.c, call.ldc);
      require<InternalError>(
          code == 0, [&] { return "gemm: torch says: " + std::string(torch->last_error()); });
      return;
    }
    case GemmRoute::kPython:
      return multiply_in_python(call);
    case GemmRoute::kReference:
      (void)reference_gemm(nullptr, call);
      return;
  }
}

void bind_torch(py::module_& m) {
  loaded_in = getpid();
  m.def(
      "core_table", [] { return reinterpret_cast<std::uint64_t>(&kCoreTable); },
      "Address of the SluiceCoreTable, for `torch.ops.sluice.bind`.");
  m.def("set_torch_table", &set_torch_table, py::arg("address"),
        "Address of _ops's SluiceTorchTable (0: forget it).");
  m.def("set_python_gemm", &set_python_gemm, py::arg("fn").none(true),
        "Without _ops: gemm(dtype, m, n, k, a, b, c, ldc) in Python, called with the GIL.");
  m.def("num_threads", &num_threads, "Threads that kernels use now.");
}

}  // namespace sluice::bindings
