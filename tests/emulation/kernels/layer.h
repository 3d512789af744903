#pragma once

#include <algorithm>
#include <cmath>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "kernels/exact_gate.h"
#include "kernels/expert_list.h"
#include "tests/emulation/kernels/device_array.h"

namespace sluice::testing {

struct Types {
  DType weights, activations;
};
/// What the kernels serve.
inline constexpr Types kTypes[] = {{DType::kBF16, DType::kBF16},
                                   {DType::kF16, DType::kF16},
                                   {DType::kF32, DType::kF32},
                                   {DType::kBF16, DType::kF32},
                                   {DType::kF16, DType::kF32}};

enum class Values {
  kSmallIntegers,  ///< halves: every sum of up to 2^20 products is exact in fp32, in any order
  kNormal,
};

/// Values that `dtype` holds exactly.
inline std::vector<float> draw(Values values, DType dtype, std::int64_t count, float scale,
                               std::mt19937& random) {
  std::vector<float> drawn(static_cast<std::size_t>(count));
  std::normal_distribution<float> normal;
  for (float& value : drawn) {
    value = values == Values::kSmallIntegers
                ? 0.5f * static_cast<float>(static_cast<int>(random() % 5) - 2)
                : scale * normal(random);
  }
  return values == Values::kSmallIntegers ? drawn : decode(dtype, encode(dtype, drawn));
}

/// The experts of a layer, on both sides. Each section is an allocation of its own: one read past a
/// matrix faults.
class Experts {
 public:
  struct Host {
    std::vector<float> w13 = {}, w2 = {}, b13 = {}, b2 = {};
  };

  Experts(const ExpertProblem& problem, std::int64_t w13_rows, int num_experts, bool biased,
          Values values, std::mt19937& random) {
    const auto matrix = [&](std::int64_t rows, std::int64_t columns) {
      const float scale = 1 / std::sqrt(static_cast<float>(columns));
      return draw(values, problem.weights, rows * columns, scale, random);
    };
    for (int e = 0; e < num_experts; ++e) {
      Host host{.w13 = matrix(w13_rows, problem.hidden),
                .w2 = matrix(problem.hidden, problem.intermediate)};
      ExpertWeights weights{.w13 = upload(encode(problem.weights, host.w13)),
                            .w2 = upload(encode(problem.weights, host.w2))};
      if (biased) {
        host.b13 = draw(values, DType::kF32, w13_rows, 1, random);
        host.b2 = draw(values, DType::kF32, problem.hidden, 1, random);
        weights.b13 = reinterpret_cast<const float*>(upload(encode(DType::kF32, host.b13)));
        weights.b2 = reinterpret_cast<const float*>(upload(encode(DType::kF32, host.b2)));
      }
      host_.push_back(std::move(host));
      device_.push_back(weights);
    }
  }

  [[nodiscard]] int count() const { return static_cast<int>(device_.size()); }
  [[nodiscard]] const Host& host(int expert) const {
    return host_[static_cast<std::size_t>(expert)];
  }
  [[nodiscard]] const ExpertWeights& device(int expert) const {
    return device_[static_cast<std::size_t>(expert)];
  }
  /// These experts by value, in this order.
  [[nodiscard]] ExpertEntries entries(const std::vector<int>& experts) const {
    ExpertEntries list;
    for (const int expert : experts) {
      list.entries[list.count++] = {.weights = device(expert), .expert = expert};
    }
    return list;
  }
  /// A table in which only these are present.
  [[nodiscard]] ExpertTable table(const std::vector<int>& experts) {
    std::vector<ExpertWeights> entries(device_.size());
    for (const int expert : experts) entries[static_cast<std::size_t>(expert)] = device(expert);
    tables_.emplace_back(entries);
    return {.experts = tables_.back().data(), .count = count()};
  }
  [[nodiscard]] std::vector<int> all() const {
    std::vector<int> experts(device_.size());
    for (std::size_t e = 0; e < experts.size(); ++e) experts[e] = static_cast<int>(e);
    return experts;
  }

 private:
  const std::byte* upload(const std::vector<std::byte>& bytes) {
    sections_.emplace_back(bytes);
    return sections_.back().data();
  }
  std::vector<Host> host_;
  std::vector<ExpertWeights> device_;
  std::vector<DeviceArray<std::byte>> sections_;
  std::vector<DeviceArray<ExpertWeights>> tables_;
};

/// Which expert has which entries, on both sides.
class Routing {
 public:
  /// Expert e gets counts[e] entries, anywhere; `absent` more go to no expert.
  Routing(const std::vector<int>& counts, int top_k, int absent, std::mt19937& random)
      : num_experts_(static_cast<int>(counts.size())), top_k_(top_k) {
    for (int e = 0; e < num_experts_; ++e) {
      ids_.insert(ids_.end(), static_cast<std::size_t>(counts[static_cast<std::size_t>(e)]), e);
    }
    ids_.insert(ids_.end(), static_cast<std::size_t>(absent), -1);
    while (ids_.size() % static_cast<std::size_t>(top_k) != 0) ids_.push_back(num_experts_);
    std::shuffle(ids_.begin(), ids_.end(), random);
    sort();
    offsets_device_ = std::make_unique<DeviceArray<std::int32_t>>(offsets_);
    // As `launch_route` leaves it: what is behind the last row is undefined.
    rows_device_ = std::make_unique<DeviceArray<std::int32_t>>(ids_.size());
    const fake::Peek peek;
    std::copy(rows_.begin(), rows_.end(), rows_device_->data());
    simt::mark_defined(rows_device_->data(), rows_.size() * sizeof(std::int32_t));
  }

  [[nodiscard]] RoutedRows device() const {
    return {.offsets = offsets_device_->data(),
            .rows = rows_device_->data(),
            .num_experts = num_experts_,
            .top_k = top_k_};
  }
  [[nodiscard]] const std::vector<std::int64_t>& ids() const { return ids_; }
  [[nodiscard]] std::int64_t num_entries() const { return static_cast<std::int64_t>(ids_.size()); }
  [[nodiscard]] std::int64_t num_tokens() const { return num_entries() / top_k_; }
  [[nodiscard]] int num_experts() const { return num_experts_; }
  [[nodiscard]] int top_k() const { return top_k_; }
  [[nodiscard]] int begin(int expert) const { return offsets_[static_cast<std::size_t>(expert)]; }
  [[nodiscard]] int count(int expert) const { return begin(expert + 1) - begin(expert); }
  [[nodiscard]] int row(int position) const { return rows_[static_cast<std::size_t>(position)]; }

 private:
  void sort() {
    for (int e = 0; e <= num_experts_; ++e) {
      offsets_.push_back(static_cast<std::int32_t>(rows_.size()));
      for (std::size_t i = 0; i < ids_.size() && e < num_experts_; ++i) {
        if (ids_[i] == e) rows_.push_back(static_cast<std::int32_t>(i));
      }
    }
  }
  int num_experts_;
  int top_k_;
  std::vector<std::int64_t> ids_;
  std::vector<std::int32_t> offsets_, rows_;
  std::unique_ptr<DeviceArray<std::int32_t>> offsets_device_, rows_device_;
};

/// Sum and sum of magnitudes of row · x (+ bias), in fp64.
struct Dot {
  double sum = 0;
  double magnitude = 0;
};
inline Dot dot(const float* row, const float* x, std::int64_t columns, const float* bias) {
  Dot dot;
  for (std::int64_t c = 0; c < columns; ++c) {
    const double term = static_cast<double>(row[c]) * x[c];
    dot.sum += term;
    dot.magnitude += std::abs(term);
  }
  if (bias != nullptr) {
    dot.sum += *bias;
    dot.magnitude += std::abs(*bias);
  }
  return dot;
}

/// The one place of tolerances: how far a sum of `columns` products, kept in fp32 in any order and
/// in any of the mma's models, may be from the exact one. Rounding errors are random but for the
/// truncating model, whose mean grows with the number of additions of eight products in one warp;
/// both are relative to a partial sum, which is never above the sum of magnitudes.
inline double sum_tolerance(std::int64_t columns, double magnitude) {
  const double terms = static_cast<double>(columns);
  return 0x1p-24 * magnitude * (4 + 2 * std::sqrt(terms) + terms / 64);
}
/// Rows of w13 that make channel `channel`; without a gate both are its row.
struct ChannelRows {
  std::int64_t gate, up;
};
inline ChannelRows channel_rows(const ExpertProblem& problem, std::int64_t channel) {
  if (!is_gated(problem.gate.kind)) return {channel, channel};
  if (problem.gate.interleaved) return {2 * channel, 2 * channel + 1};
  return {channel, problem.intermediate + channel};
}

[[nodiscard]] inline std::string text(const ExpertProblem& problem) {
  return std::string(dtype_name(problem.weights)) + " weights, " +
         std::string(dtype_name(problem.activations)) + " activations, H " +
         std::to_string(problem.hidden) + ", I " + std::to_string(problem.intermediate) + ", " +
         std::string(gate_name(problem.gate.kind)) +
         (problem.gate.interleaved ? " interleaved" : "");
}

}  // namespace sluice::testing
