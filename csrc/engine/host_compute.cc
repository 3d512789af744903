#include "engine/host_compute.h"

#include <algorithm>
#include <string>

#include "kernels/combine.h"
#include "kernels/convert.h"

namespace sluice {

bool HostCompute::takes_several(const Grouping::Group& group) const {
  return group.count <= kFewTokens && !spec_->has_callback();
}

const Grouping& HostCompute::begin(const ForwardArgs& args, const StoredLayer& layer,
                                   const LayerSpec& spec) {
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
  grouping_.assign(args, layer.num_experts);
  generic_gate_calls_ = 0;
  rows_ = row_scratch_.reserve<float>(args.num_tokens * args.top_k * layer.layout.hidden);
  widen_inputs();
  count_workspace();
  return grouping_;
}

// Only rows of experts on the few-token path, each token's once.
void HostCompute::widen_inputs() {
  const std::int64_t hidden = layer_->layout.hidden;
  input_of_token_.assign(static_cast<std::size_t>(args_->num_tokens), -1);
  std::int32_t count = 0;
  std::int64_t rows = 0;
  for (const Grouping::Group& group : grouping_.groups()) {
    if (!takes_several(group)) continue;
    rows += group.count;
    for (const std::int64_t row : grouping_.rows_of(group)) {
      std::int32_t& input = input_of_token_[static_cast<std::size_t>(row / args_->top_k)];
      if (input < 0) input = count++;
    }
  }
  // Room for the largest batch, so that pointers into these never move while it is collected.
  inputs_.reserve(static_cast<std::size_t>(rows));
  outputs_.reserve(static_cast<std::size_t>(rows));
  works_.reserve(grouping_.groups().size());
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
    widen(args_->activations, element_at(args_->hidden, token * hidden, args_->activations),
          widened + input * hidden, hidden);
  }
}

void HostCompute::several(std::span<const ReadyExpert> experts) {
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
    for (const std::int64_t idx : grouping_.rows_of(*expert.group)) {
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

void HostCompute::combine_rows() {
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
    weights[place] = grouping_.weights()[idx];
    std::copy_n(rows_ + idx * width, width, rows.data() + place * static_cast<std::size_t>(width));
  }
  planted_order_.clear();
  combine(rows.data(), weights.data(), valid.data(), args_->num_tokens, args_->top_k, width,
          args_->activations, args_->out, parallel_);
  return;
#endif
  combine(rows_, grouping_.weights(), grouping_.valid(), args_->num_tokens, args_->top_k,
          layer_->layout.hidden, args_->activations, args_->out, parallel_);
}

std::array<Scratch*, 10> HostCompute::scratches() {
  return {&row_scratch_,     &input_scratch_,       &decode_scratch_, &gather_scratch_,
          &gate_up_scratch_, &gate_up_f32_scratch_, &h_scratch_,      &h_f32_scratch_,
          &result_scratch_,  &widen_scratch_};
}

void HostCompute::count_workspace() {
  std::uint64_t bytes = 0;
  for (const Scratch* const scratch : scratches()) bytes += scratch->bytes();
  workspace_bytes_ = bytes;
}

void HostCompute::close() noexcept {
  for (Scratch* const scratch : scratches()) scratch->free();
  workspace_bytes_ = 0;
}

}  // namespace sluice
