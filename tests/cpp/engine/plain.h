#pragma once

#include <cmath>
#include <map>
#include <vector>

#include "engine/model.h"
#include "kernels/gate.h"
#include "kernels/gemm.h"

namespace sluice::testing {

/// The forward as one would write it without a cache: every expert resident, one after the other.
/// Shares kernels with the engine and nothing else.
class PlainForward {
 public:
  explicit PlainForward(const Model& model) : model_(model) {}

  [[nodiscard]] std::vector<std::byte> operator()(const Call& call) {
    call_ = &call;
    const std::int64_t hidden = model_.layout().hidden;
    rows_.assign(static_cast<std::size_t>(call.num_tokens * call.top_k * hidden), 0.0f);
    std::vector<float> weights(call.ids.size());
    widen(call.weights_dtype, call.weights.data(), weights.data(),
          static_cast<std::int64_t>(weights.size()));
    std::map<std::int64_t, std::vector<std::int64_t>> rows_of;
    std::vector<bool> valid(call.ids.size(), false);
    for (std::size_t i = 0; i < call.ids.size(); ++i) {
      if (call.ids[i] < 0 || call.ids[i] >= model_.shape().num_experts || weights[i] == 0) continue;
      rows_of[call.ids[i]].push_back(static_cast<std::int64_t>(i));
      valid[i] = true;
    }
    const LayerSpec& spec = model_.specs()[0];
    for (const auto& [expert, rows] : rows_of) {
      const ExpertKey key{call.layer, ExpertIdx{static_cast<std::int32_t>(expert)}};
      const bool callback = spec.gate.kind == GateKind::kGeneric || spec.post_expert_callback;
      if (std::cmp_less_equal(rows.size(), kFewTokens) && !callback) {
        few(key, rows);
      } else {
        many(key, rows);
      }
    }
    std::vector<float> sum(static_cast<std::size_t>(call.num_tokens * hidden), 0.0f);
    for (std::size_t i = 0; i < call.ids.size(); ++i) {
      if (!valid[i]) continue;
      const auto token = static_cast<std::int64_t>(i) / call.top_k;
      for (std::int64_t c = 0; c < hidden; ++c) {
        float& value = sum[static_cast<std::size_t>(token * hidden + c)];
        value = std::fma(weights[i], *row(static_cast<std::int64_t>(i), c), value);
      }
    }
    std::vector<std::byte> out(sum.size() * element_bytes(call.activations));
    narrow(call.activations, sum.data(), out.data(), static_cast<std::int64_t>(sum.size()));
    return out;
  }

 private:
  [[nodiscard]] float* row(std::int64_t idx, std::int64_t column) {
    return rows_.data() + idx * model_.layout().hidden + column;
  }
  [[nodiscard]] std::vector<float> input(std::int64_t idx) const {
    const std::int64_t hidden = model_.layout().hidden;
    std::vector<float> values(static_cast<std::size_t>(hidden));
    const std::size_t offset =
        static_cast<std::size_t>(idx / call_->top_k * hidden) * element_bytes(call_->activations);
    widen(call_->activations, call_->hidden.data() + offset, values.data(), hidden);
    return values;
  }
  /// The expert's bytes where GEMMs may read them.
  [[nodiscard]] AlignedBuffer aligned(ExpertKey key) const {
    AlignedBuffer copy(model_.layout().bytes());
    std::memcpy(copy.data(), model_.expert(key), model_.layout().bytes());
    return copy;
  }
  [[nodiscard]] const float* bias(const AlignedBuffer& expert, std::size_t offset) const {
    return model_.layout().has_bias ? reinterpret_cast<const float*>(expert.data() + offset)
                                    : nullptr;
  }

  void few(ExpertKey key, const std::vector<std::int64_t>& indices) {
    const ExpertLayout& layout = model_.layout();
    const AlignedBuffer expert = aligned(key);
    std::vector<std::vector<float>> inputs;
    std::vector<const float*> in;
    std::vector<float*> out;
    for (const std::int64_t idx : indices) inputs.push_back(input(idx));
    for (std::size_t i = 0; i < indices.size(); ++i) {
      in.push_back(inputs[i].data());
      out.push_back(row(indices[i], 0));
    }
    const ExpertDecodeProblem problem{.weights = layout.dtype,
                                      .activations = call_->activations,
                                      .hidden = layout.hidden,
                                      .intermediate = layout.intermediate,
                                      .gate = model_.specs()[0].gate};
    std::vector<float> scratch(static_cast<std::size_t>(
        expert_decode_scratch(problem, static_cast<std::int64_t>(indices.size()))));
    const ExpertWork work{.weights = {.w13 = expert.data(),
                                      .w2 = expert.data() + layout.w2_offset(),
                                      .b13 = bias(expert, layout.b13_offset()),
                                      .b2 = bias(expert, layout.b2_offset())},
                          .inputs = in.data(),
                          .outputs = out.data(),
                          .num_tokens = static_cast<std::int32_t>(indices.size())};
    SerialFor serial;
    expert_decode(problem, {&work, 1}, scratch.data(), serial);
  }

  /// c[m, n] = a · bᵀ + bias; rounded to the activations' type before and, if `round_after`, after
  /// the bias; wide.
  [[nodiscard]] std::vector<float> multiply(const std::vector<float>& a, std::int64_t m,
                                            std::int64_t n, std::int64_t k, const std::byte* b,
                                            const float* bias_values, bool round_after) const {
    const DType dtype = call_->activations;
    AlignedBuffer narrow_a(a.size() * element_bytes(dtype));
    narrow(dtype, a.data(), narrow_a.data(), m * k);
    AlignedBuffer wide_b(static_cast<std::size_t>(n * k) * element_bytes(dtype));
    if (dtype == model_.layout().dtype) {
      std::memcpy(wide_b.data(), b, static_cast<std::size_t>(n * k) * element_bytes(dtype));
    } else {
      widen(model_.layout().dtype, b, reinterpret_cast<float*>(wide_b.data()), n * k);
    }
    AlignedBuffer c(static_cast<std::size_t>(m * n) * element_bytes(dtype));
    reference_gemm(nullptr, {.dtype = dtype,
                             .m = m,
                             .n = n,
                             .k = k,
                             .a = narrow_a.data(),
                             .b = wide_b.data(),
                             .c = c.data(),
                             .ldc = n});
    std::vector<float> result(static_cast<std::size_t>(m * n));
    widen(dtype, c.data(), result.data(), m * n);
    if (bias_values == nullptr) return result;
    for (std::int64_t i = 0; i < m * n; ++i)
      result[static_cast<std::size_t>(i)] += bias_values[i % n];
    if (round_after) round(result);
    return result;
  }
  void round(std::vector<float>& values) const {
    const auto count = static_cast<std::int64_t>(values.size());
    std::vector<std::byte> rounded(values.size() * element_bytes(call_->activations));
    narrow(call_->activations, values.data(), rounded.data(), count);
    widen(call_->activations, rounded.data(), values.data(), count);
  }
  /// A callback on wide values.
  [[nodiscard]] std::vector<float> call_back(const ExpertCallback& callback,
                                             const std::vector<float>& in, std::int64_t m,
                                             std::int64_t in_columns,
                                             std::int64_t out_columns) const {
    const DType dtype = call_->activations;
    std::vector<std::byte> given(in.size() * element_bytes(dtype));
    narrow(dtype, in.data(), given.data(), m * in_columns);
    std::vector<std::byte> taken(static_cast<std::size_t>(m * out_columns) * element_bytes(dtype));
    callback(call_->layer, dtype, m, in_columns, out_columns, given.data(), taken.data());
    std::vector<float> out(static_cast<std::size_t>(m * out_columns));
    widen(dtype, taken.data(), out.data(), m * out_columns);
    return out;
  }

  void many(ExpertKey key, const std::vector<std::int64_t>& indices) {
    const ExpertLayout& layout = model_.layout();
    const LayerSpec& spec = model_.specs()[0];
    const AlignedBuffer expert = aligned(key);
    const auto m = static_cast<std::int64_t>(indices.size());
    std::vector<float> x;
    for (const std::int64_t idx : indices) {
      const std::vector<float> values = input(idx);
      x.insert(x.end(), values.begin(), values.end());
    }
    const bool generic = spec.gate.kind == GateKind::kGeneric;
    const std::vector<float> gate_up =
        multiply(x, m, layout.w13_rows(), layout.hidden, expert.data(),
                 bias(expert, layout.b13_offset()), generic);
    std::vector<float> h(static_cast<std::size_t>(m * layout.intermediate));
    if (generic) {
      h = call_back(spec.gate_callback, gate_up, m, layout.w13_rows(), layout.intermediate);
    } else {
      apply_gate(spec.gate, gate_up.data(), h.data(), m, layout.intermediate);
      round(h);
    }
    const bool post = spec.post_expert_callback != nullptr;
    std::vector<float> y =
        multiply(h, m, layout.hidden, layout.intermediate, expert.data() + layout.w2_offset(),
                 bias(expert, layout.b2_offset()), post);
    if (post) y = call_back(spec.post_expert_callback, y, m, layout.hidden, layout.hidden);
    for (std::int64_t r = 0; r < m; ++r) {
      std::memcpy(row(indices[static_cast<std::size_t>(r)], 0), y.data() + r * layout.hidden,
                  static_cast<std::size_t>(layout.hidden) * sizeof(float));
    }
  }

  const Model& model_;
  const Call* call_ = nullptr;
  std::vector<float> rows_;
};

}  // namespace sluice::testing
