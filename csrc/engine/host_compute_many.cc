// The many-token path of a call's arithmetic: two GEMMs with the gate between them, one expert at a
// time.
#include <algorithm>
#include <cstring>
#include <string>

#include "base/error.h"
#include "engine/host_compute.h"
#include "kernels/convert.h"
#include "kernels/float_env.h"

namespace sluice {
namespace {

/// Rows that one thread takes at least: below, waking another costs more than it saves.
constexpr std::int64_t kRowGrain = 8;

}  // namespace

void HostCompute::one(const ReadyExpert& expert) {
  const ExpertLayout& layout = layer_->layout;
  const DType dtype = args_->activations;
  const std::int64_t rows = expert.group->count;
  const std::int64_t hidden = layout.hidden;
  const auto indices = grouping_.rows_of(*expert.group);

  auto* const gathered = static_cast<void*>(
      gather_scratch_.reserve<std::byte>(rows * hidden * static_cast<int>(element_bytes(dtype))));
  auto gather = [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t r = begin; r < end; ++r) {
      const std::int64_t token = indices[static_cast<std::size_t>(r)] / args_->top_k;
      std::memcpy(element_at(gathered, r * hidden, dtype),
                  element_at(args_->hidden, token * hidden, dtype),
                  static_cast<std::size_t>(hidden) * element_bytes(dtype));
    }
  };
  parallel_.run(rows, kRowGrain, gather);

  void* const gate_up = gate_up_scratch_.reserve<std::byte>(rows * layout.w13_rows() *
                                                            static_cast<int>(element_bytes(dtype)));
  gemm(rows, layout.w13_rows(), hidden, gathered, expert.weights.w13, gate_up);
  const void* const h = gate(expert, gate_up);
  const std::int64_t result_bytes = rows * hidden * static_cast<int>(element_bytes(dtype));
  std::byte* const results =
      result_scratch_.reserve<std::byte>(result_bytes * (spec_->post_expert_callback ? 2 : 1));
  gemm(rows, hidden, layout.intermediate, h, expert.weights.w2, results);
  if (!spec_->post_expert_callback) {
    scatter(expert, results, expert.weights.b2);
  } else {
    if (expert.weights.b2 != nullptr) bias_in_place(results, expert.weights.b2, rows, hidden);
    call_back(spec_->post_expert_callback, "post-expert callback", *args_, *layer_, rows, hidden,
              hidden, results, results + result_bytes);
    scatter(expert, results + result_bytes, nullptr);
  }
  count_workspace();
}

// c[rows, n] = a[rows, k] · weights[n, k]ᵀ in the activations' type.
void HostCompute::gemm(std::int64_t rows, std::int64_t n, std::int64_t k, const void* a,
                       const void* weights, void* c) {
  const DType dtype = args_->activations;
  const DType stored = layer_->layout.dtype;
  const std::int64_t step = stored == dtype ? n : kWidenRows;
  for (std::int64_t first = 0; first < n; first += step) {
    const std::int64_t count = std::min(step, n - first);
    const void* b = weights;
    if (stored != dtype) {
      float* const wide = widen_scratch_.reserve<float>(
          kWidenRows * std::max(layer_->layout.hidden, layer_->layout.intermediate));
      auto convert = [&](std::int64_t begin, std::int64_t end) {
        widen(stored, element_at(weights, (first + begin) * k, stored), wide + begin * k,
              (end - begin) * k);
      };
      parallel_.run(count, kRowGrain, convert);
      b = wide;
    }
    const int code = gemm_(gemm_context_, {.dtype = dtype,
                                           .m = rows,
                                           .n = count,
                                           .k = k,
                                           .a = a,
                                           .b = b,
                                           .c = element_at(c, first, dtype),
                                           .ldc = n});
    require<InternalError>(code == 0, [&] {
      return "forward of " + layer_->name + ": the GEMM gave code " + std::to_string(code) +
             ", expected 0";
    });
  }
}

// gate_up → h, both in the activations' type; h may lie in either scratch.
const void* HostCompute::gate(const ReadyExpert& expert, void* gate_up) {
  const ExpertLayout& layout = layer_->layout;
  const DType dtype = args_->activations;
  const std::int64_t rows = expert.group->count;
  const std::int64_t columns = layout.w13_rows();
  const float* const bias = expert.weights.b13;
  std::byte* const h = h_scratch_.reserve<std::byte>(rows * layout.intermediate *
                                                     static_cast<int>(element_bytes(dtype)));
  if (spec_->gate.kind == GateKind::kGeneric) {
    if (bias != nullptr) bias_in_place(gate_up, bias, rows, columns);
    ++generic_gate_calls_;
    call_back(spec_->gate_callback, "gate callback", *args_, *layer_, rows, columns,
              layout.intermediate, gate_up, h);
    return h;
  }
  const bool wide = dtype == DType::kF32;
  float* const gate_up_f32 =
      wide ? static_cast<float*>(gate_up) : gate_up_f32_scratch_.reserve<float>(rows * columns);
  float* const h_f32 = wide ? reinterpret_cast<float*>(h)
                            : h_f32_scratch_.reserve<float>(rows * layout.intermediate);
  auto apply = [&](std::int64_t begin, std::int64_t end) {
    const DefaultFloatEnv env;
    const std::int64_t count = end - begin;
    float* const in = gate_up_f32 + begin * columns;
    float* const out = h_f32 + begin * layout.intermediate;
    if (!wide) widen(dtype, element_at(gate_up, begin * columns, dtype), in, count * columns);
    if (bias != nullptr) add_bias(in, bias, count, columns);
    apply_gate(spec_->gate, in, out, count, layout.intermediate);
    if (!wide) {
      narrow(dtype, out, element_at(static_cast<void*>(h), begin * layout.intermediate, dtype),
             count * layout.intermediate);
    }
  };
  parallel_.run(rows, kRowGrain, apply);
  return h;
}

void HostCompute::add_bias(float* matrix, const float* bias, std::int64_t rows,
                           std::int64_t columns) {
  for (std::int64_t r = 0; r < rows; ++r) {
    float* const values = matrix + r * columns;
    for (std::int64_t c = 0; c < columns; ++c) values[c] += bias[c];
  }
}

// For callbacks, which see the model's own type: widen, add, round once.
void HostCompute::bias_in_place(void* matrix, const float* bias, std::int64_t rows,
                                std::int64_t columns) {
  const DefaultFloatEnv env;
  const DType dtype = args_->activations;
  if (dtype == DType::kF32) {
    add_bias(static_cast<float*>(matrix), bias, rows, columns);
    return;
  }
  float* const wide = gate_up_f32_scratch_.reserve<float>(rows * columns);
  widen(dtype, matrix, wide, rows * columns);
  add_bias(wide, bias, rows, columns);
  narrow(dtype, wide, matrix, rows * columns);
}

void HostCompute::scatter(const ReadyExpert& expert, const void* result, const float* bias) {
  const std::int64_t hidden = layer_->layout.hidden;
  const auto indices = grouping_.rows_of(*expert.group);
  auto copy = [&](std::int64_t begin, std::int64_t end) {
    const DefaultFloatEnv env;
    for (std::int64_t r = begin; r < end; ++r) {
      float* const target = row(indices[static_cast<std::size_t>(r)]);
      widen(args_->activations, element_at(result, r * hidden, args_->activations), target, hidden);
      if (bias != nullptr) add_bias(target, bias, 1, hidden);
    }
  };
  parallel_.run(expert.group->count, kRowGrain, copy);
}

}  // namespace sluice
