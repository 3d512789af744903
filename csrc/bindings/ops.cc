// _ops: the hot call as a torch operator, over LibTorch's stable ABI and the bridge alone. It links
// no core of ours: `bind` takes the table of _core's functions and gives the address of its own.
#include <dlfcn.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <array>
#include <atomic>
#include <cstdint>
#include <exception>
#include <optional>
#include <string>

#include "bindings/bridge.h"

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

std::atomic<const SluiceCoreTable*> core_table{nullptr};
thread_local std::string last_gemm_error;

constexpr std::array kTypes{ScalarType::Float, ScalarType::BFloat16, ScalarType::Half};

/// The bridge's number of a floating type, or -1.
std::int32_t bridge_dtype(ScalarType type) {
  for (std::size_t i = 0; i < kTypes.size(); ++i) {
    if (kTypes[i] == type) return static_cast<std::int32_t>(i);
  }
  return -1;
}

std::string shape_text(const Tensor& tensor) {
  std::string text = "[";
  for (std::int64_t i = 0; i < tensor.dim(); ++i) {
    text += (i == 0 ? "" : ", ") + std::to_string(tensor.size(i));
  }
  return text + "]";
}

/// Contiguous, on a 16-byte boundary: what kernels read. A view into another tensor may be neither.
Tensor made_dense(const Tensor& tensor) {
  const Tensor dense = tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor);
  const bool aligned = reinterpret_cast<std::uintptr_t>(dense.const_data_ptr()) % 16 == 0;
  return aligned ? dense : torch::stable::clone(dense);
}

/// Torch's current stream of a CUDA device. Looked up in the torch of this process: the library
/// that has it is not there in a CPU build, and must not be linked (kernels room README).
std::uint64_t current_stream(std::int32_t device) {
  using Fn = AOTITorchError (*)(std::int32_t, void**);
  static const Fn fn = [] {
    void* const library = dlopen("libtorch_cuda.so", RTLD_NOLOAD | RTLD_LAZY);
    return library == nullptr
               ? nullptr
               : reinterpret_cast<Fn>(dlsym(library, "aoti_torch_get_current_cuda_stream"));
  }();
  STD_TORCH_CHECK(fn != nullptr,
                  "sluice::experts_forward: got CUDA tensors from a torch without "
                  "aoti_torch_get_current_cuda_stream, expected torch >= 2.10; update torch");
  void* stream = nullptr;
  STD_TORCH_CHECK(fn(device, &stream) == 0,
                  "sluice::experts_forward: torch has no current stream on cuda:", device);
  return reinterpret_cast<std::uint64_t>(stream);
}

/// `data` as a tensor that owns nothing; strides in elements.
Tensor view(const void* data, std::int64_t rows, std::int64_t columns, std::int64_t row_stride,
            std::int64_t column_stride, ScalarType type) {
  const std::array<std::int64_t, 2> sizes{rows, columns};
  const std::array<std::int64_t, 2> strides{row_stride, column_stride};
  return torch::stable::from_blob(const_cast<void*>(data), {sizes.data(), sizes.size()},
                                  {strides.data(), strides.size()},
                                  torch::stable::Device(torch::headeronly::DeviceType::CPU), type);
}

std::int32_t gemm(std::int32_t dtype, std::int64_t m, std::int64_t n, std::int64_t k, const void* a,
                  const void* b, void* c, std::int64_t ldc) {
  try {
    const ScalarType type = kTypes.at(static_cast<std::size_t>(dtype));
    const Tensor left = view(a, m, k, k, 1, type);
    const Tensor right = view(b, k, n, 1, k, type);  // b is [n, k]: transposed by its strides
    const Tensor out = view(c, m, n, ldc, 1, type);
    std::array<StableIValue, 3> stack{torch::stable::detail::from(left),
                                      torch::stable::detail::from(right),
                                      torch::stable::detail::from(out)};
    STABLE_TORCH_ERROR_CODE_CHECK(
        torch_call_dispatcher("aten::mm", "out", stack.data(), TORCH_ABI_VERSION));
    (void)torch::stable::detail::to<Tensor>(stack[0]);  // the same `out` again
    return 0;
  } catch (const std::exception& error) {
    last_gemm_error = error.what();
    return 1;
  }
}

std::int32_t num_threads() { return static_cast<std::int32_t>(torch::stable::get_num_threads()); }

void parallel_for(std::int64_t count, std::int64_t grain, void* context,
                  void (*call)(void*, std::int64_t, std::int64_t)) {
  torch::stable::parallel_for(
      0, count, grain,
      [context, call](std::int64_t begin, std::int64_t end) { call(context, begin, end); });
}

const char* last_error() { return last_gemm_error.c_str(); }

constexpr SluiceTorchTable kTorchTable{
    kSluiceBridgeVersion, sizeof(SluiceTorchTable), &gemm, &num_threads, &parallel_for,
    &last_error};

std::int64_t bind(std::int64_t address) {
  const auto* table = reinterpret_cast<const SluiceCoreTable*>(address);
  if (table != nullptr) {
    STD_TORCH_CHECK(table->version == kSluiceBridgeVersion &&
                        table->bytes == static_cast<std::int32_t>(sizeof(SluiceCoreTable)),
                    "sluice::bind: got a table of version ", table->version, " with ", table->bytes,
                    " bytes, expected version ", static_cast<int>(kSluiceBridgeVersion), " with ",
                    sizeof(SluiceCoreTable),
                    "; _core and _ops are of different builds, reinstall sluice");
  }
  core_table.store(table, std::memory_order_release);
  return reinterpret_cast<std::int64_t>(&kTorchTable);
}

/// Shapes: hidden [T, H], ids [T, K] int64, weights [T, K] → [T, H] of hidden's type.
Tensor experts_forward(std::int64_t handle, std::int64_t layer, const Tensor& hidden,
                       const Tensor& ids, const Tensor& weights) {
  const SluiceCoreTable* table = core_table.load(std::memory_order_acquire);
  STD_TORCH_CHECK(table != nullptr,
                  "sluice::experts_forward: no core is bound; call sluice.ops.load() first");
  STD_TORCH_CHECK(hidden.dim() == 2, "sluice::experts_forward: hidden: got ", shape_text(hidden),
                  ", expected [T, H]");
  STD_TORCH_CHECK(ids.dim() == 2 && ids.size(0) == hidden.size(0),
                  "sluice::experts_forward: ids: got ", shape_text(ids), ", expected [",
                  hidden.size(0), ", K]");
  STD_TORCH_CHECK(
      weights.dim() == 2 && weights.size(0) == ids.size(0) && weights.size(1) == ids.size(1),
      "sluice::experts_forward: weights: got ", shape_text(weights), ", expected ",
      shape_text(ids));
  const std::int32_t activations = bridge_dtype(hidden.scalar_type());
  const std::int32_t weights_dtype = bridge_dtype(weights.scalar_type());
  STD_TORCH_CHECK(activations >= 0,
                  "sluice::experts_forward: hidden: expected float32, bfloat16 or float16");
  STD_TORCH_CHECK(weights_dtype >= 0,
                  "sluice::experts_forward: weights: expected float32, bfloat16 or float16");
  STD_TORCH_CHECK(ids.scalar_type() == ScalarType::Long,
                  "sluice::experts_forward: ids: expected int64");
  const std::int32_t device = hidden.is_cpu() ? -1 : hidden.get_device_index();
  for (const Tensor* tensor : {&ids, &weights}) {
    STD_TORCH_CHECK(
        tensor->is_cpu() == hidden.is_cpu() && (device < 0 || tensor->get_device_index() == device),
        "sluice::experts_forward: expected hidden, ids and weights on one device");
  }

  const std::array<std::int64_t, 2> shape{hidden.size(0), hidden.size(1)};
  Tensor out = torch::stable::new_empty(hidden, {shape.data(), shape.size()});
  const Tensor dense_hidden = made_dense(hidden);
  const Tensor dense_ids = made_dense(ids);
  const Tensor dense_weights = made_dense(weights);
  SluiceForwardCall call{};
  call.handle = handle;
  call.layer = layer;
  call.num_tokens = shape[0];
  call.top_k = ids.size(1);
  call.activations = activations;
  call.weights_dtype = weights_dtype;
  call.hidden = dense_hidden.const_data_ptr();
  call.expert_ids = static_cast<const std::int64_t*>(dense_ids.const_data_ptr());
  call.weights = dense_weights.const_data_ptr();
  call.out = out.mutable_data_ptr();
  call.columns = shape[1];
  call.device = device;
  call.stream = device < 0 ? 0 : current_stream(device);
  STD_TORCH_CHECK(table->forward(&call) == 0,
                  "sluice::experts_forward failed; sluice._core.take_error(", handle,
                  ") has the error");
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY(sluice, m) {
  m.def(
      "experts_forward(int handle, int layer, Tensor hidden, Tensor ids, Tensor weights) -> "
      "Tensor");
  m.def("bind(int core_table) -> int");
}

STABLE_TORCH_LIBRARY_IMPL(sluice, CPU, m) {
  m.impl("experts_forward", TORCH_BOX(&experts_forward));
}

STABLE_TORCH_LIBRARY_IMPL(sluice, CUDA, m) {
  m.impl("experts_forward", TORCH_BOX(&experts_forward));
}

STABLE_TORCH_LIBRARY_IMPL(sluice, CompositeExplicitAutograd, m) {
  m.impl("bind", TORCH_BOX(&bind));
}
