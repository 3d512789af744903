#pragma once

// What an expert's two products must be, for any of the kernels that compute them.

#include <string>
#include <vector>

#include "tests/emulation/kernels/layer.h"

namespace sluice::testing {

/// `rows` rows of an array of `dtype`, as their bytes.
[[nodiscard]] inline std::vector<std::byte> row_bytes(const std::vector<std::byte>& all,
                                                      DType dtype, std::int64_t row,
                                                      std::int64_t columns) {
  const std::size_t bytes = static_cast<std::size_t>(columns) * element_bytes(dtype);
  const auto first =
      all.begin() + static_cast<std::ptrdiff_t>(static_cast<std::size_t>(row) * bytes);
  return {first, first + static_cast<std::ptrdiff_t>(bytes)};
}
[[nodiscard]] inline bool untouched(const std::vector<std::byte>& bytes) {
  return std::all_of(bytes.begin(), bytes.end(), [](std::byte b) { return b == std::byte{0xff}; });
}
[[nodiscard]] inline const float* bias_at(const std::vector<float>& bias, std::int64_t row) {
  return bias.empty() ? nullptr : bias.data() + row;
}

/// Row `position` of the input of gate_up: the hidden row of its token.
[[nodiscard]] inline const float* hidden_of(const std::vector<float>& hidden,
                                            const Routing& routing, int position,
                                            std::int64_t width) {
  return hidden.data() + routing.row(position) / routing.top_k() * width;
}

/// Exact values of one row of h: the sums are exact, so the kernel's gate must give the host's
/// bits.
[[nodiscard]] inline std::vector<std::byte> exact_h(const ExpertProblem& problem,
                                                    const Experts::Host& expert, const float* x) {
  const std::int64_t rows = w13_rows(problem);
  std::vector<float> product(static_cast<std::size_t>(rows));
  for (std::int64_t r = 0; r < rows; ++r) {
    const Dot sum = dot(expert.w13.data() + r * problem.hidden, x, problem.hidden, nullptr);
    const float* const bias = bias_at(expert.b13, r);
    const auto rounded = static_cast<float>(sum.sum);  // -0 stays it without a bias
    product[static_cast<std::size_t>(r)] = bias == nullptr ? rounded : rounded + *bias;
  }
  std::vector<float> h(static_cast<std::size_t>(problem.intermediate));
  apply_gate(problem.gate, product.data(), h.data(), 1, problem.intermediate);
  return encode(problem.activations, h);
}

/// The largest error of one row of h, in units of what it may be.
[[nodiscard]] inline double h_error(const ExpertProblem& problem, const Experts::Host& expert,
                                    const float* x, const std::vector<float>& got) {
  double worst = 0;
  for (std::int64_t i = 0; i < problem.intermediate; ++i) {
    const ChannelRows rows = channel_rows(problem, i);
    const auto row_dot = [&](std::int64_t row) {
      return dot(expert.w13.data() + row * problem.hidden, x, problem.hidden,
                 bias_at(expert.b13, row));
    };
    const Dot g = row_dot(rows.gate);
    const Dot u = row_dot(rows.up);
    const double dg = sum_tolerance(problem.hidden, g.magnitude);
    const double du = sum_tolerance(problem.hidden, u.magnitude);
    const double exact = exact_gate(problem.gate, g.sum, u.sum);
    double spread = 0;
    for (const double a : {-dg, 0.0, dg}) {
      for (const double b : {-du, 0.0, du}) {
        spread = std::max(spread, std::abs(exact_gate(problem.gate, g.sum + a, u.sum + b) - exact));
      }
    }
    // The gate's own roundings, 8 of them, are relative to its parts; then one to the type.
    const double allowed = spread + 8 * 0x1p-24 * (1 + std::abs(g.sum)) * (1 + std::abs(u.sum)) +
                           half_ulp(problem.activations) * std::abs(exact);
    const double error = std::abs(static_cast<double>(got[static_cast<std::size_t>(i)]) - exact);
    worst = std::max(worst, std::isnan(error) ? INFINITY : error / allowed);
  }
  return worst;
}

/// One row of w2 · h (+ b2) where everything is exact in fp32.
[[nodiscard]] inline std::vector<float> exact_product(const std::vector<float>& matrix,
                                                      const std::vector<float>& bias,
                                                      std::int64_t rows, std::int64_t columns,
                                                      const float* x) {
  std::vector<float> product(static_cast<std::size_t>(rows));
  for (std::int64_t r = 0; r < rows; ++r) {
    product[static_cast<std::size_t>(r)] =
        static_cast<float>(dot(matrix.data() + r * columns, x, columns, bias_at(bias, r)).sum);
  }
  return product;
}

/// The largest error of one row of a product, in units of what it may be. `rounded_to` is the type
/// of `got`.
[[nodiscard]] inline double product_error(const std::vector<float>& matrix,
                                          const std::vector<float>& bias, std::int64_t rows,
                                          std::int64_t columns, const float* x, const float* got,
                                          DType rounded_to) {
  double worst = 0;
  for (std::int64_t r = 0; r < rows; ++r) {
    const Dot exact = dot(matrix.data() + r * columns, x, columns, bias_at(bias, r));
    const double allowed = sum_tolerance(columns, exact.magnitude) +
                           half_ulp(rounded_to) * std::abs(exact.sum) + 1e-30;
    const double error = std::abs(static_cast<double>(got[r]) - exact.sum);
    worst = std::max(worst, std::isnan(error) ? INFINITY : error / allowed);
  }
  return worst;
}

}  // namespace sluice::testing
