#pragma once

#include "kernels/column_overlap.h"

namespace sluice {

/// The definition, and the same on a CPU with AVX2.
void count_overlap_scalar(const ColumnOverlap& c);
void compare_columns_scalar(const ColumnOverlap& c, const ColumnSimilarity& s);
void count_overlap_avx2(const ColumnOverlap& c);
void compare_columns_avx2(const ColumnOverlap& c, const ColumnSimilarity& s);

}  // namespace sluice
