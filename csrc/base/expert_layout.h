#pragma once

#include <cstddef>
#include <cstdint>

#include "base/bytes.h"
#include "base/dtype.h"

namespace sluice {

/// The one canonical byte order of a plain expert, in packs, slots and RAM alike:
/// `w13 [2I, H] | w2 [H, I] | b13 f32 [2I] | b2 f32 [H]`, row-major, each section starting on a
/// multiple of 64 bytes (zeros between), so that in a slot every matrix is where torch's GEMM may
/// read it (law 1). Without a gate `w13` is `[I, H]`; without biases the last two are absent.
/// Whether gate and up rows alternate (gpt-oss) travels in `GateSpec::interleaved`.
///
/// Shapes: H hidden width seen by the experts, I intermediate width.
struct ExpertLayout {
  DType dtype = DType::kF32;
  std::int64_t hidden = 0;
  std::int64_t intermediate = 0;
  bool gated = true;
  bool has_bias = false;

  bool operator==(const ExpertLayout&) const = default;

  /// Rows of w13: 2I with a gate, else I.
  [[nodiscard]] std::int64_t w13_rows() const { return (gated ? 2 : 1) * intermediate; }
  [[nodiscard]] std::size_t w13_bytes() const {
    return static_cast<std::size_t>(w13_rows() * hidden) * element_bytes(dtype);
  }
  [[nodiscard]] std::size_t w2_bytes() const {
    return static_cast<std::size_t>(hidden * intermediate) * element_bytes(dtype);
  }
  [[nodiscard]] std::size_t w2_offset() const { return align_up(w13_bytes(), kSlotAlignment); }
  [[nodiscard]] std::size_t b13_offset() const {
    return align_up(w2_offset() + w2_bytes(), kSlotAlignment);
  }
  [[nodiscard]] std::size_t b2_offset() const {
    return align_up(b13_offset() + static_cast<std::size_t>(w13_rows()) * sizeof(float),
                    kSlotAlignment);
  }
  /// Bytes of the expert, without padding behind its last section.
  [[nodiscard]] std::size_t bytes() const {
    return has_bias ? b2_offset() + static_cast<std::size_t>(hidden) * sizeof(float)
                    : w2_offset() + w2_bytes();
  }
};

}  // namespace sluice
