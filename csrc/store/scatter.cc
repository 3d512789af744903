#include "store/scatter.h"

#include <algorithm>
#include <cstring>

#include "base/dtype.h"

namespace sluice {
namespace {

// 32 x 32 elements: at most 8 KiB of source and target lines at once.
constexpr std::uint32_t kTile = 32;

// The type only names a width; elements are moved, never read as numbers.
template <class T>
void transpose(const Scatter& part, const std::byte* source, std::byte* target) {
  const std::size_t source_row = std::size_t{part.columns} * sizeof(T);
  const std::size_t target_row = std::size_t{part.target_stride} * sizeof(T);
  for (std::uint32_t row0 = 0; row0 < part.rows; row0 += kTile) {
    const std::uint32_t row1 = std::min(part.rows, row0 + kTile);
    for (std::uint32_t column0 = 0; column0 < part.columns; column0 += kTile) {
      const std::uint32_t column1 = std::min(part.columns, column0 + kTile);
      for (std::uint32_t column = column0; column < column1; ++column) {
        std::byte* out = target + column * target_row + row0 * sizeof(T);
        const std::byte* in = source + row0 * source_row + column * sizeof(T);
        for (std::uint32_t row = row0; row < row1; ++row) {
          std::memcpy(out, in, sizeof(T));
          out += sizeof(T);
          in += source_row;
        }
      }
    }
  }
}

void widen_bytes(const Scatter& part, const std::byte* source, std::byte* target) {
  dispatch_dtype(part.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    for (std::size_t i = 0; i < part.bytes / sizeof(T); ++i) {
      T value;
      std::memcpy(&value, source + i * sizeof(T), sizeof(T));
      const float wide = to_float(value);
      std::memcpy(target + i * sizeof(float), &wide, sizeof(float));
    }
  });
}

}  // namespace

void scatter(const Scatter& part, const std::byte* source, std::byte* slot) {
  std::byte* target = slot + part.target;
  switch (part.transform) {
    case Piece::Transform::kCopy:
      std::memcpy(target, source, part.bytes);
      break;
    case Piece::Transform::kTranspose:
      if (element_bytes(part.dtype) == 4) {
        transpose<std::uint32_t>(part, source, target);
      } else {
        transpose<std::uint16_t>(part, source, target);
      }
      break;
    case Piece::Transform::kWiden:
      widen_bytes(part, source, target);
      break;
  }
}

std::uint64_t target_bytes(Piece::Transform transform, DType dtype, std::uint64_t source_bytes) {
  if (transform != Piece::Transform::kWiden) return source_bytes;
  return source_bytes / element_bytes(dtype) * sizeof(float);
}

}  // namespace sluice
