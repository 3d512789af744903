#include "kernels/gate.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <limits>
#include <random>

#include "base/error.h"
#include "kernels/exact_gate.h"
#include "kernels/test_data.h"

namespace sluice {
namespace {

using testing::kGateKinds;
using testing::tiers;

constexpr float kInfinity = std::numeric_limits<float>::infinity();

/// Values of every magnitude and sign, and the odd ones.
std::vector<float> values_of_all_sizes() {
  std::vector<float> values = {0.0f,    -0.0f,   kInfinity, -kInfinity, std::nanf(""), 1e-45f,
                               -1e-45f, 1e-38f,  3.4e38f,   -3.4e38f,   0.625f,        -0.625f,
                               1.0f,    -1.0f,   7.0f,      -7.0f,      88.72f,        88.73f,
                               -87.3f,  -103.9f, -104.1f,   1.4142135f};
  std::mt19937 random(1);
  std::uniform_real_distribution<float> uniform(-1, 1);
  for (int i = 0; i < 20'000; ++i) {
    values.push_back(std::ldexp(uniform(random), static_cast<int>(random() % 20) - 12));
  }
  for (int i = 0; i < 2'000; ++i) {
    values.push_back(std::bit_cast<float>(static_cast<std::uint32_t>(random())));
  }
  return values;
}

/// apply_gate on one row whose gate and up values are given.
std::vector<float> gate(CpuIsa isa, const GateSpec& spec, const std::vector<float>& g,
                        const std::vector<float>& u) {
  std::vector<float> row;
  if (!is_gated(spec.kind)) {
    row = u;
  } else if (spec.interleaved) {
    for (std::size_t i = 0; i < u.size(); ++i) row.insert(row.end(), {g[i], u[i]});
  } else {
    row = g;
    row.insert(row.end(), u.begin(), u.end());
  }
  std::vector<float> out(u.size());
  apply_gate(isa, spec, row.data(), out.data(), 1, static_cast<std::int64_t>(u.size()));
  return out;
}

bool same_value(float a, float b) {
  if (std::isnan(a) || std::isnan(b)) return std::isnan(a) && std::isnan(b);
  return std::bit_cast<std::uint32_t>(a) == std::bit_cast<std::uint32_t>(b);
}

TEST(Gate, EveryTierGivesTheBitsOfTheDefinition) {
  const std::vector<float> u = values_of_all_sizes();
  std::vector<float> g = u;
  std::shuffle(g.begin(), g.end(), std::mt19937(2));
  for (const GateKind kind : kGateKinds) {
    for (const bool interleaved : {false, true}) {
      const GateSpec spec{.kind = kind, .interleaved = interleaved, .alpha = 1.7f, .limit = 3.0f};
      const auto expected = gate(CpuIsa::kScalar, spec, g, u);
      for (const CpuIsa isa : tiers()) {
        const auto got = gate(isa, spec, g, u);
        for (std::size_t i = 0; i < got.size(); ++i) {
          ASSERT_TRUE(same_value(got[i], expected[i]))
              << gate_name(kind) << " of " << g[i] << ", " << u[i] << " in " << cpu_isa_name(isa);
        }
      }
    }
  }
}

TEST(Gate, TailsOfEveryLengthMatchWholeVectors) {
  std::vector<float> g(70);
  std::vector<float> u(70);
  for (std::size_t i = 0; i < g.size(); ++i) {
    g[i] = 0.1f * static_cast<float>(i) - 3;
    u[i] = 2 - 0.07f * static_cast<float>(i);
  }
  for (const CpuIsa isa : tiers()) {
    const auto whole = gate(isa, {}, g, u);
    for (std::size_t count = 0; count < g.size(); ++count) {
      const std::vector<float> few_g(g.begin(), g.begin() + static_cast<std::ptrdiff_t>(count));
      const std::vector<float> few_u(u.begin(), u.begin() + static_cast<std::ptrdiff_t>(count));
      const auto few = gate(isa, {}, few_g, few_u);
      ASSERT_TRUE(std::equal(few.begin(), few.end(), whole.begin())) << count;
    }
  }
}

long double sigmoid(long double x) { return 1 / (1 + std::exp(-x)); }

/// Largest distance from the truth in units of the last place of its fp32 rounding.
double worst_ulps(const GateSpec& spec, long double (*truth)(long double), float low, float high) {
  std::vector<float> x;
  for (int i = 0; i <= 200'000; ++i) {
    x.push_back(low + (high - low) * static_cast<float>(i) / 200'000);
  }
  const auto got = gate(tiers().back(), spec, x, std::vector<float>(x.size(), 1.0f));
  const auto alone = is_gated(spec.kind) ? got : gate(tiers().back(), spec, x, x);
  double worst = 0;
  for (std::size_t i = 0; i < x.size(); ++i) {
    const long double exact = truth(x[i]);
    const float rounded = static_cast<float>(exact);
    const float next = std::nextafter(std::abs(rounded), kInfinity);
    const double ulp = std::max<double>(double{next} - std::abs(rounded), 0x1p-149);
    worst = std::max(worst, static_cast<double>(std::abs(alone[i] - exact)) / ulp);
  }
  return worst;
}

// Bounds: each function's own roundings, counted in units of the last place.

TEST(Gate, SiluIsWithinFourUlps) {
  const auto truth = [](long double x) { return x * sigmoid(x); };
  EXPECT_LT(worst_ulps({.kind = GateKind::kSilu}, truth, -85, 85), 4);
  EXPECT_LT(worst_ulps({.kind = GateKind::kSilu}, truth, -1, 1), 4);
  EXPECT_LT(worst_ulps({.kind = GateKind::kSiluOnly}, truth, -20, 20), 4);
}

TEST(Gate, GeluIsWithinFourUlpsWhereOnePlusErfDoesNotCancel) {
  const auto truth = [](long double x) { return 0.5L * x * std::erfc(-x / std::sqrt(2.0L)); };
  EXPECT_LT(worst_ulps({.kind = GateKind::kGelu}, truth, -0.5, 6), 4);
  EXPECT_LT(worst_ulps({.kind = GateKind::kGeluOnly}, truth, -0.01f, 0.01f), 4);
}

TEST(Gate, TanhGeluIsWithinFourUlpsWhereOnePlusTanhDoesNotCancel) {
  const auto truth = [](long double x) {
    return 0.5L * x *
           (1 + std::tanh(std::sqrt(2 / std::acos(-1.0L)) * (x + 0.044715L * x * x * x)));
  };
  EXPECT_LT(worst_ulps({.kind = GateKind::kGeluTanh}, truth, -0.5, 6), 4);
}

TEST(Gate, NegativeGelusAreWithinTheRoundingOfOne) {
  // 1 + erf is rounded at 1: an error of half an ulp of 1 times x / 2, as in torch.
  std::vector<float> x;
  for (int i = 0; i < 10'000; ++i) x.push_back(-static_cast<float>(i) * 1e-3f);
  const std::vector<float> ones(x.size(), 1.0f);
  const auto exact_gelu = gate(tiers().back(), {.kind = GateKind::kGelu}, x, ones);
  const auto tanh_gelu = gate(tiers().back(), {.kind = GateKind::kGeluTanh}, x, ones);
  for (std::size_t i = 0; i < x.size(); ++i) {
    const double v = x[i];
    const double bound = std::abs(v) * 2 * 0x1p-24 + 1e-45;
    ASSERT_NEAR(exact_gelu[i], 0.5 * v * std::erfc(-v / std::sqrt(2.0)), bound) << v;
    const double inner = std::sqrt(2 / std::acos(-1.0)) * (v + 0.044715 * v * v * v);
    ASSERT_NEAR(tanh_gelu[i], 0.5 * v * (1 + std::tanh(inner)), bound) << v;
  }
}

TEST(Gate, NotANumberPassesThroughEveryKind) {
  const float nan = std::nanf("");
  for (const GateKind kind : kGateKinds) {
    for (const CpuIsa isa : tiers()) {
      EXPECT_TRUE(std::isnan(gate(isa, {.kind = kind}, {1.0f}, {nan})[0])) << gate_name(kind);
      if (!is_gated(kind)) continue;
      EXPECT_TRUE(std::isnan(gate(isa, {.kind = kind}, {nan}, {1.0f})[0])) << gate_name(kind);
    }
  }
}

TEST(Gate, LimitsClampGateAboveAndUpOnBothSides) {
  const auto clamped = [&](GateKind kind, float g, float u) {
    return gate(tiers().back(), {.kind = kind, .alpha = 1.702f, .limit = 7.0f}, {g}, {u})[0];
  };
  for (const GateKind kind : {GateKind::kClampedSilu, GateKind::kOaiSwiglu}) {
    EXPECT_EQ(clamped(kind, 100, 2), clamped(kind, 7, 2));
    EXPECT_NE(clamped(kind, -8, 2), clamped(kind, -7, 2));
    EXPECT_EQ(clamped(kind, 1, 100), clamped(kind, 1, 7));
    EXPECT_EQ(clamped(kind, 1, -100), clamped(kind, 1, -7));
  }
  EXPECT_EQ(clamped(GateKind::kOaiSwiglu, 1, -1), 0.0f);  // up + 1
}

TEST(Gate, WithoutAGateItMayRunInPlace) {
  std::vector<float> values = {-2, -1, 0, 1, 2, 3, 4, 5, 6};
  apply_gate({.kind = GateKind::kRelu2}, values.data(), values.data(), 1, 9);
  EXPECT_EQ(values, (std::vector<float>{0, 0, 0, 1, 4, 9, 16, 25, 36}));
}

TEST(Gate, RowsAreIndependent) {
  std::vector<float> rows(3 * 2 * 5);
  for (std::size_t i = 0; i < rows.size(); ++i) rows[i] = 0.3f * static_cast<float>(i) - 4;
  std::vector<float> all(15);
  apply_gate({}, rows.data(), all.data(), 3, 5);
  for (std::size_t r = 0; r < 3; ++r) {
    std::vector<float> one(5);
    apply_gate({}, rows.data() + 10 * r, one.data(), 1, 5);
    EXPECT_TRUE(
        std::equal(one.begin(), one.end(), all.begin() + static_cast<std::ptrdiff_t>(5 * r)));
  }
}

TEST(Gate, NamesAreReadBackAndOthersRefused) {
  for (const GateKind kind : kGateKinds) EXPECT_EQ(parse_gate(gate_name(kind)), kind);
  EXPECT_EQ(parse_gate("generic"), GateKind::kGeneric);
  EXPECT_THROW((void)parse_gate("swish"), ConfigError);
  float value = 0;
  EXPECT_THROW(apply_gate({.kind = GateKind::kGeneric}, &value, &value, 1, 1), InternalError);
}

}  // namespace
}  // namespace sluice
