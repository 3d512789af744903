#include "kernels/expert_decode.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <string>

#include "base/error.h"
#include "kernels/exact_gate.h"
#include "kernels/test_data.h"

namespace sluice {
namespace {

using testing::Elements;
using testing::exact_gate;
using testing::half_ulp;
using testing::kGateKinds;
using testing::tiers;

constexpr DType kDTypes[] = {DType::kF32, DType::kBF16, DType::kF16};

/// One expert with its tokens, in memory of its own.
struct Expert {
  Expert(const ExpertDecodeProblem& problem, bool biased, int tokens, std::size_t offset,
         std::mt19937& random)
      : rows13((is_gated(problem.gate.kind) ? 2 : 1) * problem.intermediate),
        w13(problem.weights, rows13 * problem.hidden, offset, random),
        w2(problem.weights, problem.hidden * problem.intermediate, offset, random),
        b13(DType::kF32, rows13, offset / 4 * 4, random),
        b2(DType::kF32, problem.hidden, offset / 4 * 4, random),
        has_bias(biased) {
    for (int t = 0; t < tokens; ++t) {
      inputs.emplace_back(DType::kF32, problem.hidden, offset / 4 * 4, random);
      outputs.emplace_back(static_cast<std::size_t>(problem.hidden), -1.0f);
    }
    for (int t = 0; t < tokens; ++t) {
      input_rows.push_back(inputs[static_cast<std::size_t>(t)].floats());
      output_rows.push_back(outputs[static_cast<std::size_t>(t)].data());
    }
  }

  [[nodiscard]] ExpertWork work() {
    return {.weights = {.w13 = w13.data(),
                        .w2 = w2.data(),
                        .b13 = has_bias ? b13.floats() : nullptr,
                        .b2 = has_bias ? b2.floats() : nullptr},
            .inputs = input_rows.data(),
            .outputs = output_rows.data(),
            .num_tokens = static_cast<std::int32_t>(inputs.size())};
  }

  std::int64_t rows13;
  Elements w13, w2, b13, b2;
  bool has_bias;
  std::vector<Elements> inputs;
  std::vector<std::vector<float>> outputs;
  std::vector<const float*> input_rows;
  std::vector<float*> output_rows;
};

using Outputs = std::vector<std::vector<float>>;

std::vector<Outputs> run(CpuIsa isa, const ExpertDecodeProblem& problem,
                         std::vector<Expert*> experts, ParallelFor& parallel) {
  std::vector<ExpertWork> works;
  std::int64_t tokens = 0;
  for (Expert* expert : experts) {
    works.push_back(expert->work());
    tokens += works.back().num_tokens;
    for (auto& row : expert->outputs) std::fill(row.begin(), row.end(), -1.0f);
  }
  std::vector<float> scratch(static_cast<std::size_t>(expert_decode_scratch(problem, tokens)));
  expert_decode(isa, problem, works, scratch.data(), parallel);
  std::vector<Outputs> results;
  for (Expert* expert : experts) results.push_back(expert->outputs);
  return results;
}

bool same_bits(const std::vector<Outputs>& a, const std::vector<Outputs>& b) {
  if (a.size() != b.size()) return false;
  for (std::size_t e = 0; e < a.size(); ++e) {
    if (a[e].size() != b[e].size()) return false;
    for (std::size_t t = 0; t < a[e].size(); ++t) {
      if (a[e][t].size() != b[e][t].size()) return false;
      if (std::memcmp(a[e][t].data(), b[e][t].data(), a[e][t].size() * sizeof(float)) != 0) {
        return false;
      }
    }
  }
  return true;
}

struct Case {
  ExpertDecodeProblem problem;
  bool biased;
  int tokens;
  std::size_t offset;

  [[nodiscard]] std::string text() const {
    return std::string(dtype_name(problem.weights)) + " weights, " +
           std::string(dtype_name(problem.activations)) + " activations, H " +
           std::to_string(problem.hidden) + ", I " + std::to_string(problem.intermediate) + ", " +
           std::string(gate_name(problem.gate.kind)) +
           (problem.gate.interleaved ? " interleaved" : "") + (biased ? ", biased, " : ", ") +
           std::to_string(tokens) + " tokens, offset " + std::to_string(offset);
  }
};

/// Shapes around every tail and tile, the other axes drawn so that all values occur often.
std::vector<Case> sweep() {
  std::vector<Case> cases;
  std::mt19937 random(7);
  const auto pick = [&](std::size_t count) { return random() % count; };
  const std::int64_t sizes[] = {1, 2, 7, 15, 16, 17, 31, 33, 48, 63, 65, 100, 192, 257};
  for (const DType weights : kDTypes) {
    for (const std::int64_t hidden : sizes) {
      for (const std::int64_t intermediate : sizes) {
        Case c{};
        c.problem = {.weights = weights,
                     .activations = kDTypes[pick(3)],
                     .hidden = hidden,
                     .intermediate = intermediate,
                     .gate = {.kind = kGateKinds[pick(std::size(kGateKinds))],
                              .interleaved = pick(2) == 0,
                              .alpha = 1.702f,
                              .limit = 1.5f}};
        c.biased = pick(2) == 0;
        c.tokens = static_cast<int>(1 + pick(kFewTokens));
        c.offset = pick(64) / element_bytes(weights) * element_bytes(weights);
        cases.push_back(c);
      }
    }
  }
  return cases;
}

TEST(ExpertDecode, EveryTierGivesTheBitsOfTheDefinition) {
  std::mt19937 random(1);
  SerialFor serial;
  for (const Case& c : sweep()) {
    Expert expert(c.problem, c.biased, c.tokens, c.offset, random);
    const auto expected = run(CpuIsa::kScalar, c.problem, {&expert}, serial);
    for (const CpuIsa isa : tiers()) {
      ASSERT_TRUE(same_bits(expected, run(isa, c.problem, {&expert}, serial)))
          << cpu_isa_name(isa) << ": " << c.text();
    }
  }
}

TEST(ExpertDecode, BitsIgnoreTheAddressOfTheWeights) {
  SerialFor serial;
  for (const DType weights : kDTypes) {
    const ExpertDecodeProblem problem{
        .weights = weights, .activations = DType::kBF16, .hidden = 70, .intermediate = 37};
    for (const CpuIsa isa : tiers()) {
      std::vector<Outputs> expected;
      for (std::size_t offset = 0; offset < 64; offset += element_bytes(weights)) {
        std::mt19937 random(2);
        Expert expert(problem, true, 3, offset, random);
        const auto got = run(isa, problem, {&expert}, serial);
        if (offset == 0) expected = got;
        ASSERT_TRUE(same_bits(expected, got)) << cpu_isa_name(isa) << ", offset " << offset;
      }
    }
  }
}

TEST(ExpertDecode, AgreesWithFp64WithinRounding) {
  std::mt19937 random(3);
  SerialFor serial;
  for (const Case& c : sweep()) {
    Expert expert(c.problem, c.biased, c.tokens, c.offset, random);
    const auto got = run(tiers().back(), c.problem, {&expert}, serial)[0];
    const auto hidden = static_cast<std::size_t>(c.problem.hidden);
    const auto inter = static_cast<std::size_t>(c.problem.intermediate);
    const bool gated = is_gated(c.problem.gate.kind);
    for (std::size_t t = 0; t < got.size(); ++t) {
      const auto& x = expert.inputs[t].values();
      std::vector<double> product(static_cast<std::size_t>(expert.rows13));
      double largest = 1;
      for (std::size_t r = 0; r < product.size(); ++r) {
        double sum = c.biased ? expert.b13.values()[r] : 0.0;
        for (std::size_t k = 0; k < hidden; ++k) {
          sum += double{expert.w13.values()[r * hidden + k]} * x[k];
        }
        product[r] = sum;
        largest = std::max(largest, std::abs(sum));
      }
      std::vector<double> h(inter);
      double largest_h = 1;
      for (std::size_t i = 0; i < inter; ++i) {
        const bool alternating = gated && c.problem.gate.interleaved;
        const double g = gated ? product[alternating ? 2 * i : i] : 0;
        const double u = gated ? product[alternating ? 2 * i + 1 : inter + i] : product[i];
        h[i] = exact_gate(c.problem.gate, g, u);
        largest_h = std::max(largest_h, std::abs(h[i]));
      }
      // Standard deviations of a product's terms and of its rounding errors are both √C: an error
      // of 8 of them has no chance in this many cases. A gate multiplies two such products.
      const double gate_error = 16 * 0x1p-24 * std::sqrt(double(hidden) + 1) * largest * 2 +
                                2 * half_ulp(c.problem.activations) * largest_h;
      for (std::size_t r = 0; r < hidden; ++r) {
        double sum = c.biased ? expert.b2.values()[r] : 0.0;
        double weight = 0;
        for (std::size_t k = 0; k < inter; ++k) {
          sum += expert.w2.values()[r * inter + k] * h[k];
          weight += std::pow(expert.w2.values()[r * inter + k], 2);
        }
        const double tolerance = 8 * std::sqrt(weight + 1) *
                                 (gate_error + 0x1p-24 * std::sqrt(double(inter)) * largest_h);
        ASSERT_NEAR(got[t][r], sum, tolerance) << c.text() << ", token " << t << ", row " << r;
      }
    }
  }
}

/// The range cut into single items, last first, on the caller's thread.
class BackwardsFor final : public ParallelFor {
 public:
  [[nodiscard]] int num_threads() const override { return 2; }
  void run(std::int64_t count, std::int64_t grain, RangeFn fn) override {
    for (std::int64_t end = count; end > 0;) {
      const std::int64_t begin = (end - 1) / grain * grain;
      fn(begin, end);
      end = begin;
    }
  }
};

TEST(ExpertDecode, BitsIgnoreThreadsAndTheOtherWorks) {
  std::mt19937 random(4);
  for (const DType weights : kDTypes) {
    ExpertDecodeProblem problem{
        .weights = weights, .activations = DType::kF16, .hidden = 331, .intermediate = 200};
    problem.gate.interleaved = true;
    std::vector<std::unique_ptr<Expert>> owned;
    std::vector<Expert*> experts;
    for (int e = 0; e < 6; ++e) {
      owned.push_back(
          std::make_unique<Expert>(problem, true, 1 + e % 4, 2 * element_bytes(weights), random));
      experts.push_back(owned.back().get());
    }
    SerialFor serial;
    BackwardsFor backwards;
    for (const CpuIsa isa : tiers()) {
      std::vector<Outputs> alone;
      for (Expert* expert : experts) alone.push_back(run(isa, problem, {expert}, serial)[0]);
      ASSERT_TRUE(same_bits(alone, run(isa, problem, experts, serial)));
      ASSERT_TRUE(same_bits(alone, run(isa, problem, experts, backwards)));
      for (const int threads : {1, 2, 3}) {
        const auto pool = make_thread_pool(threads);
        ASSERT_TRUE(same_bits(alone, run(isa, problem, experts, *pool))) << threads << " threads";
      }
      std::vector<Expert*> turned(experts.rbegin(), experts.rend());
      auto back = run(isa, problem, turned, backwards);
      std::reverse(back.begin(), back.end());
      ASSERT_TRUE(same_bits(alone, back));
    }
  }
}

TEST(ExpertDecode, ATokensBitsIgnoreTheTokensBesideIt) {
  std::mt19937 random(5);
  SerialFor serial;
  for (const DType weights : kDTypes) {
    const ExpertDecodeProblem problem{
        .weights = weights, .activations = DType::kBF16, .hidden = 129, .intermediate = 75};
    Expert all(problem, true, static_cast<int>(kFewTokens), 0, random);
    for (const CpuIsa isa : tiers()) {
      const auto together = run(isa, problem, {&all}, serial)[0];
      for (std::int64_t count = 1; count < kFewTokens; ++count) {
        for (std::int64_t first = 0; first + count <= kFewTokens; ++first) {
          ExpertWork work = all.work();
          work.inputs += first;
          work.outputs += first;
          work.num_tokens = static_cast<std::int32_t>(count);
          for (auto& row : all.outputs) std::fill(row.begin(), row.end(), -1.0f);
          std::vector<float> scratch(
              static_cast<std::size_t>(expert_decode_scratch(problem, count)));
          expert_decode(isa, problem, {&work, 1}, scratch.data(), serial);
          for (std::int64_t t = first; t < first + count; ++t) {
            const auto at = static_cast<std::size_t>(t);
            ASSERT_EQ(std::memcmp(together[at].data(), all.outputs[at].data(), 129 * 4), 0)
                << cpu_isa_name(isa) << ", " << count << " tokens from " << first;
          }
        }
      }
    }
  }
}

TEST(ExpertDecode, RefusesTheGenericGateAndTooManyTokens) {
  std::mt19937 random(6);
  SerialFor serial;
  ExpertDecodeProblem problem{
      .weights = DType::kF32, .activations = DType::kF32, .hidden = 4, .intermediate = 4};
  Expert crowd(problem, false, static_cast<int>(kFewTokens) + 1, 0, random);
  EXPECT_THROW(run(CpuIsa::kScalar, problem, {&crowd}, serial), InternalError);
  Expert nobody(problem, false, 0, 0, random);
  EXPECT_THROW(run(CpuIsa::kScalar, problem, {&nobody}, serial), InternalError);
  problem.gate.kind = GateKind::kGeneric;
  Expert expert(problem, false, 1, 0, random);
  EXPECT_THROW(run(CpuIsa::kScalar, problem, {&expert}, serial), InternalError);
}

TEST(ExpertDecode, NoWorksIsNoWork) {
  SerialFor serial;
  const ExpertDecodeProblem problem{.hidden = 8, .intermediate = 8};
  expert_decode(problem, {}, nullptr, serial);
}

}  // namespace
}  // namespace sluice
