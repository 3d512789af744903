// mma.sync.m16n8k16 (PTX ISA, "Matrix fragments for mma.m16n8k16 with floating point type").

#include <bit>
#include <cmath>
#include <cstring>

#include "tests/emulation/block.h"

namespace simt {
namespace {

struct MmaLane {
  float* c;
  const std::uint32_t* a;
  const std::uint32_t* b;
};

float widen_bf16(std::uint32_t bits) { return std::bit_cast<float>(bits << 16); }

float widen_fp16(std::uint32_t bits) {
  const std::uint32_t sign = (bits & 0x8000u) << 16;
  const std::uint32_t exponent = bits >> 10 & 31u;
  const std::uint32_t fraction = bits & 0x3FFu;
  if (exponent == 31) return std::bit_cast<float>(sign | 0x7F800000u | fraction << 13);
  if (exponent != 0) return std::bit_cast<float>(sign | (exponent + 112) << 23 | fraction << 13);
  // Subnormal: an integer times 2^-24, exactly.
  const float magnitude = static_cast<float>(fraction) * 0x1p-24f;
  return sign != 0 ? -magnitude : magnitude;
}

float truncated(double value) {
  const auto nearest = static_cast<float>(value);
  return std::fabs(static_cast<double>(nearest)) > std::fabs(value) ? std::nextafter(nearest, 0.0f)
                                                                    : nearest;
}

void accumulate(float (&d)[16][8], const float (&a)[16][16], const float (&b)[16][8]) {
  const MmaModel model = options().mma;
  if (model == MmaModel::kFp32InOrder) {
    for (int row = 0; row < 16; ++row) {
      for (int k = 0; k < 16; ++k) {
        for (int column = 0; column < 8; ++column) d[row][column] += a[row][k] * b[k][column];
      }
    }
    return;
  }
  for (int row = 0; row < 16; ++row) {
    for (int column = 0; column < 8; ++column) {
      for (int half = 0; half < 2; ++half) {
        double sum = d[row][column];
        for (int k = 8 * half; k < 8 * half + 8; ++k) {
          sum += static_cast<double>(a[row][k]) * static_cast<double>(b[k][column]);
        }
        d[row][column] =
            model == MmaModel::kFp64PerEight ? static_cast<float>(sum) : truncated(sum);
      }
    }
  }
}

template <float (*kWiden)(std::uint32_t)>
void multiply(void* const* lanes, unsigned /*mask*/) {
  ++counters().mma;
  alignas(64) float a[16][16], b[16][8], d[16][8];
  for (int lane = 0; lane < 32; ++lane) {
    const auto& fragment = *static_cast<const MmaLane*>(lanes[lane]);
    const int g = lane / 4, pair = 2 * (lane % 4);
    for (int i = 0; i < 2; ++i) {
      const auto half = [i](std::uint32_t word) {
        return kWiden(i == 0 ? word & 0xFFFFu : word >> 16);
      };
      a[g][pair + i] = half(fragment.a[0]);
      a[g + 8][pair + i] = half(fragment.a[1]);
      a[g][pair + 8 + i] = half(fragment.a[2]);
      a[g + 8][pair + 8 + i] = half(fragment.a[3]);
      b[pair + i][g] = half(fragment.b[0]);
      b[pair + 8 + i][g] = half(fragment.b[1]);
      d[g][pair + i] = fragment.c[i];
      d[g + 8][pair + i] = fragment.c[2 + i];
    }
  }
  accumulate(d, a, b);
  for (int lane = 0; lane < 32; ++lane) {
    const auto& fragment = *static_cast<const MmaLane*>(lanes[lane]);
    const int g = lane / 4, pair = 2 * (lane % 4);
    for (int i = 0; i < 2; ++i) {
      fragment.c[i] = d[g][pair + i];
      fragment.c[2 + i] = d[g + 8][pair + i];
    }
  }
}

}  // namespace

void mma_m16n8k16(MmaType type, float (&c)[4], const std::uint32_t (&a)[4],
                  const std::uint32_t (&b)[2], Site site) {
  MmaLane lane{.c = c, .a = a, .b = b};
  meet(Collective::kMma, ~0u, &lane,
       type == MmaType::kBf16 ? multiply<widen_bf16> : multiply<widen_fp16>, site);
}

}  // namespace simt
