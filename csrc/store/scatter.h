#pragma once

#include <cstddef>
#include <cstdint>

#include "store/expert_store.h"

namespace sluice {

/// A part of one piece, as one chunk carries it, and where it lands.
struct Scatter {
  std::uint64_t source = 0;  ///< offset in the file, or the address
  std::uint64_t target = 0;  ///< offset in the slot (a transpose: of its first element)
  std::uint32_t bytes = 0;   ///< of the source
  Piece::Transform transform = Piece::Transform::kCopy;
  DType dtype = DType::kF32;  ///< kWiden: of the source; kTranspose: of both
  std::uint32_t rows = 0;     ///< kTranspose: rows and columns of this part of the source
  std::uint32_t columns = 0;
  std::uint32_t target_stride = 0;  ///< kTranspose: elements from one target row to the next
};

/// Puts the source bytes of `part` (any alignment) into `slot`. A transpose goes by tiles that stay
/// in the first-level cache; widening to fp32 is exact.
void scatter(const Scatter& part, const std::byte* source, std::byte* slot);

/// Bytes that `part` writes.
[[nodiscard]] std::uint64_t target_bytes(Piece::Transform transform, DType dtype,
                                         std::uint64_t source_bytes);

}  // namespace sluice
