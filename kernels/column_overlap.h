#pragma once

#include <cstddef>
#include <cstdint>

namespace sluice {

/// How much a set has in common with each of many remembered ones, which lie in columns: row r of
/// `rows` says, a byte a column, whether a column holds the r-th member.
struct ColumnOverlap {
  static constexpr std::size_t kBlock = 64;

  const std::uint8_t* const* rows = nullptr;  ///< [num_rows][num_columns] of 0 and 1
  std::size_t num_rows = 0;                   ///< at most 255
  std::size_t num_columns = 0;                ///< a multiple of kBlock
  std::uint16_t* overlap = nullptr;  ///< [num_columns], to which members in common are added
};

/// Adds to `overlap`.
void count_overlap(const ColumnOverlap& columns);

/// What the same is worth: a similarity of which older overlaps fade.
struct ColumnSimilarity {
  const float* base = nullptr;     ///< [num_columns]
  float* faded = nullptr;          ///< [num_columns]
  float* best_of_block = nullptr;  ///< [num_columns / kBlock]
  float fade = 0;
  float each = 0;
  float by = 0;
};

/// `count_overlap`; then faded = faded · fade + members in common · each, and the largest
/// base + faded · by of every block. The same bits on every tier, operations rounded one by one.
void compare_columns(const ColumnOverlap& columns, const ColumnSimilarity& similarity);

}  // namespace sluice
