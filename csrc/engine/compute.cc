#include "engine/compute.h"

#include <algorithm>
#include <cstring>
#include <string>

#include "kernels/combine.h"
#include "kernels/convert.h"
#include "kernels/float_env.h"

namespace sluice {
namespace {

/// Rows that one thread takes at least: below, waking another costs more than it saves.
constexpr std::int64_t kRowGrain = 8;

const std::byte* at(const void* base, std::int64_t elements, DType dtype) {
  return static_cast<const std::byte*>(base) +
         static_cast<std::size_t>(elements) * element_bytes(dtype);
}
std::byte* at(void* base, std::int64_t elements, DType dtype) {
  return const_cast<std::byte*>(at(static_cast<const void*>(base), elements, dtype));
}

}  // namespace

bool ExpertCompute::has_callback() const {
  return spec_->gate.kind == GateKind::kGeneric || spec_->post_expert_callback != nullptr;
}

bool ExpertCompute::takes_few_path(const Grouping::Group& group) const {
  return group.count <= kFewTokens && !has_callback();
}

void ExpertCompute::begin(const ForwardArgs& args, const StoredLayer& layer, const LayerSpec& spec,
                          const Grouping& grouping) {
  require<ConfigError>(args.activations == layer.layout.dtype || args.activations == DType::kF32,
                       [&] {
                         return "forward of " + layer.name + ": got activations " +
                                std::string(dtype_name(args.activations)) + " over weights " +
                                std::string(dtype_name(layer.layout.dtype)) +
                                ", expected the weights' type or F32; cast the hidden states";
                       });
  args_ = &args;
  layer_ = &layer;
  spec_ = &spec;
  grouping_ = &grouping;
  generic_gate_calls_ = 0;
  rows_ = row_scratch_.reserve<float>(args.num_tokens * args.top_k * layer.layout.hidden);
  widen_inputs();
  count_workspace();
}

// Only rows of experts on the few-token path, each token's once.
void ExpertCompute::widen_inputs() {
  const std::int64_t hidden = layer_->layout.hidden;
  input_of_token_.assign(static_cast<std::size_t>(args_->num_tokens), -1);
  std::int32_t count = 0;
  std::int64_t rows = 0;
  for (const Grouping::Group& group : grouping_->groups()) {
    if (!takes_few_path(group)) continue;
    rows += group.count;
    for (const std::int64_t row : grouping_->rows_of(group)) {
      std::int32_t& input = input_of_token_[static_cast<std::size_t>(row / args_->top_k)];
      if (input < 0) input = count++;
    }
  }
  // Room for the largest batch, so that pointers into these never move while it is collected.
  inputs_.reserve(static_cast<std::size_t>(rows));
  outputs_.reserve(static_cast<std::size_t>(rows));
  works_.reserve(grouping_->groups().size());
  const ExpertDecodeProblem problem{.weights = layer_->layout.dtype,
                                    .activations = args_->activations,
                                    .hidden = hidden,
                                    .intermediate = layer_->layout.intermediate,
                                    .gate = spec_->gate};
  if (rows > 0) decode_scratch_.reserve<float>(expert_decode_scratch(problem, rows));
  if (args_->activations == DType::kF32) return;
  float* const widened = input_scratch_.reserve<float>(count * hidden);
  for (std::int64_t token = 0; token < args_->num_tokens; ++token) {
    const std::int32_t input = input_of_token_[static_cast<std::size_t>(token)];
    if (input < 0) continue;
    widen(args_->activations, at(args_->hidden, token * hidden, args_->activations),
          widened + input * hidden, hidden);
  }
}

void ExpertCompute::few(std::span<const ReadyExpert> experts) {
#if defined(SLUICE_PLANT_LAW3)
  works_ = std::vector<ExpertWork>(1);  // planted: memory on the hot path
#endif
  const std::int64_t hidden = layer_->layout.hidden;
  const bool wide = args_->activations == DType::kF32;
  const float* const inputs =
      wide ? static_cast<const float*>(args_->hidden) : input_scratch_.reserve<float>(0);
  works_.clear();
  inputs_.clear();
  outputs_.clear();
  for (const ReadyExpert& expert : experts) {
    const std::size_t first = inputs_.size();
    for (const std::int64_t idx : grouping_->rows_of(*expert.group)) {
      const std::int64_t token = idx / args_->top_k;
      const std::int64_t input = wide ? token : input_of_token_[static_cast<std::size_t>(token)];
      inputs_.push_back(inputs + input * hidden);
      outputs_.push_back(row(idx));
    }
    works_.push_back({.weights = expert.weights,
                      .inputs = inputs_.data() + first,
                      .outputs = outputs_.data() + first,
                      .num_tokens = static_cast<std::int32_t>(expert.group->count)});
  }
  expert_decode({.weights = layer_->layout.dtype,
                 .activations = args_->activations,
                 .hidden = hidden,
                 .intermediate = layer_->layout.intermediate,
                 .gate = spec_->gate},
                works_, decode_scratch_.reserve<float>(0), parallel_);
}

void ExpertCompute::many(const ReadyExpert& expert) {
  const ExpertLayout& layout = layer_->layout;
  const DType dtype = args_->activations;
  const std::int64_t rows = expert.group->count;
  const std::int64_t hidden = layout.hidden;
  const auto indices = grouping_->rows_of(*expert.group);

  auto* const gathered = static_cast<void*>(
      gather_scratch_.reserve<std::byte>(rows * hidden * static_cast<int>(element_bytes(dtype))));
  auto gather = [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t r = begin; r < end; ++r) {
      const std::int64_t token = indices[static_cast<std::size_t>(r)] / args_->top_k;
      std::memcpy(at(gathered, r * hidden, dtype), at(args_->hidden, token * hidden, dtype),
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
    call_back(spec_->post_expert_callback, "post-expert callback", rows, hidden, hidden, results,
              results + result_bytes);
    scatter(expert, results + result_bytes, nullptr);
  }
  count_workspace();
}

// c[rows, n] = a[rows, k] · weights[n, k]ᵀ in the activations' type.
void ExpertCompute::gemm(std::int64_t rows, std::int64_t n, std::int64_t k, const void* a,
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
        widen(stored, at(weights, (first + begin) * k, stored), wide + begin * k,
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
                                           .c = at(c, first, dtype),
                                           .ldc = n});
    require<InternalError>(code == 0, [&] {
      return "forward of " + layer_->name + ": the GEMM gave code " + std::to_string(code) +
             ", expected 0";
    });
  }
}

// gate_up → h, both in the activations' type; h may lie in either scratch.
const void* ExpertCompute::gate(const ReadyExpert& expert, void* gate_up) {
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
    call_back(spec_->gate_callback, "gate callback", rows, columns, layout.intermediate, gate_up,
              h);
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
    if (!wide) widen(dtype, at(gate_up, begin * columns, dtype), in, count * columns);
    if (bias != nullptr) add_bias(in, bias, count, columns);
    apply_gate(spec_->gate, in, out, count, layout.intermediate);
    if (!wide) {
      narrow(dtype, out, at(static_cast<void*>(h), begin * layout.intermediate, dtype),
             count * layout.intermediate);
    }
  };
  parallel_.run(rows, kRowGrain, apply);
  return h;
}

void ExpertCompute::call_back(const decltype(LayerSpec::gate_callback)& callback, const char* what,
                              std::int64_t rows, std::int64_t in_columns, std::int64_t out_columns,
                              const void* in, void* out) {
  const int code =
      callback(args_->layer, args_->activations, rows, in_columns, out_columns, in, out);
  require<InternalError>(code == 0, [&] {
    return "forward of " + layer_->name + ": the " + what + " gave code " + std::to_string(code) +
           ", expected 0";
  });
}

void ExpertCompute::add_bias(float* matrix, const float* bias, std::int64_t rows,
                             std::int64_t columns) {
  for (std::int64_t r = 0; r < rows; ++r) {
    float* const values = matrix + r * columns;
    for (std::int64_t c = 0; c < columns; ++c) values[c] += bias[c];
  }
}

// For callbacks, which see the model's own type: widen, add, round once.
void ExpertCompute::bias_in_place(void* matrix, const float* bias, std::int64_t rows,
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

void ExpertCompute::scatter(const ReadyExpert& expert, const void* result, const float* bias) {
  const std::int64_t hidden = layer_->layout.hidden;
  const auto indices = grouping_->rows_of(*expert.group);
  auto copy = [&](std::int64_t begin, std::int64_t end) {
    const DefaultFloatEnv env;
    for (std::int64_t r = begin; r < end; ++r) {
      float* const target = row(indices[static_cast<std::size_t>(r)]);
      widen(args_->activations, at(result, r * hidden, args_->activations), target, hidden);
      if (bias != nullptr) add_bias(target, bias, 1, hidden);
    }
  };
  parallel_.run(expert.group->count, kRowGrain, copy);
}

void ExpertCompute::combine_rows() {
#if defined(SLUICE_PLANT_LAW1)
  // Planted: a token's rows are summed in the order in which they were computed.
  const std::int64_t width = layer_->layout.hidden;
  const auto entries = static_cast<std::size_t>(args_->num_tokens * args_->top_k);
  std::vector<float> rows(entries * static_cast<std::size_t>(width));
  std::vector<float> weights(entries);
  std::vector<std::uint8_t> valid(entries, 0);
  for (const std::int64_t idx : planted_order_) {
    auto place = static_cast<std::size_t>(idx / args_->top_k * args_->top_k);
    while (valid[place] != 0) ++place;
    valid[place] = 1;
    weights[place] = grouping_->weights()[idx];
    std::copy_n(rows_ + idx * width, width, rows.data() + place * static_cast<std::size_t>(width));
  }
  planted_order_.clear();
  combine(rows.data(), weights.data(), valid.data(), args_->num_tokens, args_->top_k, width,
          args_->activations, args_->out, parallel_);
  return;
#endif
  combine(rows_, grouping_->weights(), grouping_->valid(), args_->num_tokens, args_->top_k,
          layer_->layout.hidden, args_->activations, args_->out, parallel_);
}

void ExpertCompute::count_workspace() {
  std::uint64_t bytes = 0;
  for (const Scratch* scratch :
       {&row_scratch_, &input_scratch_, &decode_scratch_, &gather_scratch_, &gate_up_scratch_,
        &gate_up_f32_scratch_, &h_scratch_, &h_f32_scratch_, &result_scratch_, &widen_scratch_}) {
    bytes += scratch->bytes();
  }
  workspace_bytes_ = bytes;
}

}  // namespace sluice
