#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "engine/forward.h"

namespace sluice {

/// One call's rows by expert. A row is an entry (t, k) of `expert_ids`, numbered t · K + k; the
/// rows of one expert are in ascending order, so they do not depend on anything but the call.
///
/// An entry whose id lies outside [0, E), or whose weight is exactly zero, is no row: it
/// contributes nothing and asks for no expert. (Where the expert's result is finite this is what
/// multiplying by zero gives; 0 · Inf and 0 · NaN, which would be NaN, are left out as well.)
class Grouping {
 public:
  struct Group {
    std::int32_t expert = 0;
    std::int64_t begin = 0;  ///< in rows()
    std::int64_t count = 0;
  };

  /// Sorts the entries of `args`; keeps its memory from call to call.
  void assign(const ForwardArgs& args, std::int32_t num_experts);

  /// Experts with at least one row, ascending.
  [[nodiscard]] std::span<const Group> groups() const { return groups_; }
  [[nodiscard]] std::span<const std::int64_t> rows_of(const Group& group) const {
    return {rows_.data() + group.begin, static_cast<std::size_t>(group.count)};
  }
  /// Shapes: [T, K]; 1 where the entry is a row.
  [[nodiscard]] const std::uint8_t* valid() const { return valid_.data(); }
  /// The routing weights in fp32. Shapes: [T, K].
  [[nodiscard]] const float* weights() const { return weights_.data(); }

 private:
  std::vector<float> weights_;
  std::vector<std::uint8_t> valid_;
  std::vector<std::int64_t> counts_;
  std::vector<std::int64_t> rows_;
  std::vector<Group> groups_;
};

}  // namespace sluice
