#pragma once

#include <algorithm>
#include <cstdint>

#include "kernels/tiers.h"

// The elementwise kernels written once over a vector type `V`. Included only by
// elementwise_{scalar,avx2,avx512}.cc, each of which first defines SLUICE_TIER, the attributes of
// every function below (its instruction set, always inlined), and then its own `V` in an unnamed
// namespace, so that no instantiation is shared between tiers.
//
// Numerics: only operations that IEEE 754 fixes (add, multiply, divide, fma, compare) and integer
// operations on the bits, so each tier gives the same result. `V::min(a, b)` is a < b ? a : b and
// `V::max(a, b)` is a > b ? a : b: a NaN in `b` passes through, as x86 does it.
// Polynomials are minimax fits of our own (iteratively reweighted least squares).

namespace sluice {

/// e^x, 1 ulp; underflows to 0 and overflows to infinity as the true function does.
template <class V>
SLUICE_TIER typename V::F vector_exp(typename V::F x) {
  using F = typename V::F;
  x = V::min(V::set(89.0f), V::max(V::set(-104.0f), x));
  // Adding 1.5 * 2^23 leaves the nearest integer in the low mantissa bits.
  const F magic = V::set(12582912.0f);
  const F shifted = V::fma(x, V::set(0x1.715476p+0f), magic);
  const F n = V::sub(shifted, magic);
  F r = V::fma(n, V::set(-0x1.62e400p-1f), x);  // ln 2 in two parts, the first of 12 bits
  r = V::fma(n, V::set(-0x1.7f7d1cp-20f), r);
  F q = V::fma(r, V::set(0x1.6a2436p-10f), V::set(0x1.1239e0p-7f));
  q = V::fma(q, r, V::set(0x1.5558f2p-5f));
  q = V::fma(q, r, V::set(0x1.555492p-3f));
  q = V::fma(q, r, V::set(0x1.fffffcp-2f));
  const F p = V::add(V::fma(q, V::mul(r, r), r), V::set(1.0f));
  // 2^n in two factors, each a normal number.
  const auto integer = V::isub(V::bits(shifted), V::bits(magic));
  const auto half = V::ihalf(integer);
  return V::mul(V::mul(p, V::exponent(half)), V::exponent(V::isub(integer, half)));
}

template <class V>
SLUICE_TIER typename V::F vector_sigmoid(typename V::F x) {
  const auto one = V::set(1.0f);
  const auto e = vector_exp<V>(V::neg_abs(x));
  return V::div(V::select(V::ge(x, V::set(0.0f)), one, e), V::add(one, e));
}

template <class V>
SLUICE_TIER typename V::F vector_tanh(typename V::F x) {
  const auto z = V::mul(x, x);
  auto p = V::fma(z, V::set(-0x1.75e1a8p-8f), V::set(0x1.522692p-6f));
  p = V::fma(p, z, V::set(-0x1.b83c58p-5f));
  p = V::fma(p, z, V::set(0x1.110726p-3f));
  p = V::fma(p, z, V::set(-0x1.555532p-2f));
  const auto small = V::fma(V::mul(p, z), x, x);
  // tanh |x| = (1 - e) / (1 + e), e = exp(-2 |x|)
  const auto one = V::set(1.0f);
  const auto e = vector_exp<V>(V::mul(V::set(2.0f), V::neg_abs(x)));
  const auto large = V::with_sign_of(V::div(V::sub(one, e), V::add(one, e)), x);
  return V::select(V::ge(V::neg_abs(x), V::set(-0.625f)), small, large);
}

template <class V>
SLUICE_TIER typename V::F vector_erf(typename V::F x) {
  const auto z = V::mul(x, x);
  auto p = V::fma(z, V::set(0x1.496a28p-14f), V::set(-0x1.a3f6fcp-11f));
  p = V::fma(p, z, V::set(0x1.5405b2p-8f));
  p = V::fma(p, z, V::set(-0x1.b7f90cp-6f));
  p = V::fma(p, z, V::set(0x1.ce2cf8p-4f));
  p = V::fma(p, z, V::set(-0x1.81273ep-2f));
  p = V::fma(p, z, V::set(0x1.20dd74p+0f));
  const auto small = V::mul(p, x);
  // erf |x| = 1 - exp(-q(|x|)), q fitted to -log erfc over [1, 4]; past 4 it rounds to 1.
  const auto a = V::min(V::set(4.0f), V::neg(V::neg_abs(x)));
  auto q = V::fma(a, V::set(-0x1.86de0cp-13f), V::set(0x1.825b4ap-9f));
  q = V::fma(q, a, V::set(-0x1.65cb9ep-6f));
  q = V::fma(q, a, V::set(0x1.a65356p-4f));
  q = V::fma(q, a, V::set(0x1.46bae8p-1f));
  q = V::fma(q, a, V::set(0x1.2088ecp+0f));
  q = V::fma(q, a, V::set(0x1.661a16p-12f));
  const auto large = V::with_sign_of(V::sub(V::set(1.0f), vector_exp<V>(V::neg(q))), x);
  return V::select(V::ge(V::neg_abs(x), V::set(-1.0f)), small, large);
}

template <class V>
SLUICE_TIER typename V::F vector_gelu(typename V::F x) {
  const auto erf = vector_erf<V>(V::mul(x, V::set(0x1.6a09e6p-1f)));
  return V::mul(V::mul(V::set(0.5f), x), V::add(V::set(1.0f), erf));
}

template <class V>
SLUICE_TIER typename V::F vector_gelu_tanh(typename V::F x) {
  const auto cube = V::mul(V::mul(x, x), x);
  const auto inner = V::mul(V::set(0x1.988454p-1f), V::fma(V::set(0x1.6e4e26p-5f), cube, x));
  return V::mul(V::mul(V::set(0.5f), x), V::add(V::set(1.0f), vector_tanh<V>(inner)));
}

template <class V>
SLUICE_TIER typename V::F vector_relu(typename V::F x) {
  return V::max(V::set(0.0f), x);
}

/// gate(g, u), see GateKind.
template <class V, GateKind kKind>
SLUICE_TIER typename V::F gate_value(const GateSpec& spec, typename V::F g, typename V::F u) {
  const auto limit = V::set(spec.limit);
  switch (kKind) {
    case GateKind::kSilu:
      return V::mul(V::mul(g, vector_sigmoid<V>(g)), u);
    case GateKind::kGelu:
      return V::mul(vector_gelu<V>(g), u);
    case GateKind::kGeluTanh:
      return V::mul(vector_gelu_tanh<V>(g), u);
    case GateKind::kClampedSilu: {
      g = V::min(limit, g);
      u = V::min(limit, V::max(V::neg(limit), u));
      return V::mul(V::mul(g, vector_sigmoid<V>(g)), u);
    }
    case GateKind::kOaiSwiglu: {
      g = V::min(limit, g);
      u = V::min(limit, V::max(V::neg(limit), u));
      const auto glu = V::mul(g, vector_sigmoid<V>(V::mul(V::set(spec.alpha), g)));
      return V::mul(V::add(u, V::set(1.0f)), glu);
    }
    case GateKind::kRelu:
      return V::mul(vector_relu<V>(g), u);
    case GateKind::kRelu2: {
      const auto positive = vector_relu<V>(u);
      return V::mul(positive, positive);
    }
    case GateKind::kSiluOnly:
      return V::mul(u, vector_sigmoid<V>(u));
    case GateKind::kGeluOnly:
      return vector_gelu<V>(u);
    case GateKind::kReluOnly:
      return vector_relu<V>(u);
    case GateKind::kGeneric:
      break;
  }
  return u;
}

template <class V, GateKind kKind>
SLUICE_TIER void gate_loop(const GateSpec& spec, const float* g, const float* u, float* out,
                           std::int64_t count) {
  if constexpr (!is_gated(kKind)) g = u;
  std::int64_t i = 0;
  for (; i + V::kWidth <= count; i += V::kWidth) {
    V::store(out + i, gate_value<V, kKind>(spec, V::load(g + i), V::load(u + i)));
  }
  if (i == count) return;
  const std::int64_t rest = count - i;
  V::store_some(out + i, rest,
                gate_value<V, kKind>(spec, V::load_some(g + i, rest), V::load_some(u + i, rest)));
}

template <class V>
SLUICE_TIER void gate_any(const GateSpec& spec, const float* g, const float* u, float* out,
                          std::int64_t count) {
  switch (spec.kind) {
#define SLUICE_GATE_CASE(kind) \
  case GateKind::kind:         \
    return gate_loop<V, GateKind::kind>(spec, g, u, out, count);
    SLUICE_GATE_CASE(kSilu)
    SLUICE_GATE_CASE(kGelu)
    SLUICE_GATE_CASE(kGeluTanh)
    SLUICE_GATE_CASE(kClampedSilu)
    SLUICE_GATE_CASE(kOaiSwiglu)
    SLUICE_GATE_CASE(kRelu)
    SLUICE_GATE_CASE(kRelu2)
    SLUICE_GATE_CASE(kSiluOnly)
    SLUICE_GATE_CASE(kGeluOnly)
    SLUICE_GATE_CASE(kReluOnly)
#undef SLUICE_GATE_CASE
    case GateKind::kGeneric:
      return;  // refused by the callers
  }
}

template <class V>
SLUICE_TIER void accumulate_any(float weight, const float* row, float* sum, std::int64_t count) {
  const auto w = V::set(weight);
  std::int64_t i = 0;
  for (; i + V::kWidth <= count; i += V::kWidth) {
    V::store(sum + i, V::fma(w, V::load(row + i), V::load(sum + i)));
  }
  if (i == count) return;
  const std::int64_t rest = count - i;
  V::store_some(sum + i, rest, V::fma(w, V::load_some(row + i, rest), V::load_some(sum + i, rest)));
}

}  // namespace sluice
