#pragma once

#include <cmath>
#include <cstddef>
#include <string>

#include "tests/emulation/planted/planted.h"

// What the kernels of planted.h are run on, and what is made of their results: here and on a GPU
// (tests/gpu/native/planted.cu).

namespace simt::planted {

// ---- product_kernel: small integers, compared exactly ----

inline constexpr int kTokens = 5, kRows = 128, kColumns = 256;
inline constexpr std::size_t kInputs = std::size_t{kTokens} * kColumns;
inline constexpr std::size_t kSlot = std::size_t{kRows} * kColumns;
inline constexpr std::size_t kResults = std::size_t{kTokens} * kRows;

inline float x_at(int token, int column) {
  return static_cast<float>((token * 7 + column * 3) % 11 - 5);
}
inline float w_at(int row, int column) { return static_cast<float>((row * 5 + column) % 13 - 6); }

/// Element i of x.
inline __nv_bfloat16 x_value(std::size_t i) {
  return __float2bfloat16(x_at(static_cast<int>(i) / kColumns, static_cast<int>(i) % kColumns));
}
/// Element i of a slot with w in it.
inline __nv_bfloat16 w_value(std::size_t i) {
  return __float2bfloat16(w_at(static_cast<int>(i) / kColumns, static_cast<int>(i) % kColumns));
}
/// Of y [kResults]: "" for the right result, "NaN" or "wrong result".
inline std::string judge_product(const float* y) {
  for (int token = 0; token < kTokens; ++token) {
    for (int row = 0; row < kRows; ++row) {
      float sum = 0.0f;
      for (int column = 0; column < kColumns; ++column) {
        sum += x_at(token, column) * w_at(row, column);
      }
      const float got = y[token * kRows + row];
      if (std::isnan(got)) return "NaN";
      if (got != sum) return "wrong result";
    }
  }
  return "";
}

// ---- the mechanisms ----

inline constexpr int kThreads = 64;

/// Of out [kThreads], likewise.
inline std::string judge_mechanism(const int* out) {
  for (int i = 0; i < kThreads; ++i) {
    if (out[i] != 3 * i + 1) return "wrong result";
  }
  return "";
}

}  // namespace simt::planted
