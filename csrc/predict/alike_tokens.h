#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "base/ids.h"
#include "kernels/column_overlap.h"

namespace sluice {

/// Remembered tokens, and how they are compared (`sluice.predict.networks.neighbours`).
///
/// Shapes: routes `[M, S, K]`, −1 for none; sequence `[M]`, numbers that never fall.
struct MemoryTables {
  std::vector<std::int16_t> routes;
  std::vector<std::int64_t> sequence;
  std::int32_t recent = 0;  ///< finished tokens of the running text that join them
  float running = 0;
  float previous = 0;
  float fade = 0;
  float floor = 0;
};

/// Remembered tokens that routed like the running one, layer by layer, and how soon their experts
/// were used again: `LiveRecall` of `sluice.predict.networks.futures`.
///
/// Tokens lie in columns: the fitted ones first, then a ring of those that the running text has
/// finished. A layer's overlap with all of them is the sum of K rows of bytes.
class AlikeTokens {
 public:
  AlikeTokens(MemoryTables tables, std::int32_t num_layers, std::int32_t num_experts,
              std::int32_t top_k, std::int32_t window);

  /// One token's comparison. `overlap` counts shared experts of all its layers so far.
  struct Looking {
    std::vector<std::uint16_t> overlap;
    std::vector<float> base;
    std::vector<float> running;
    float scale = 0;
  };
  /// `previous`: overlaps of the token before in its sequence; empty: it has none.
  void begin(Looking& looking, std::span<const std::uint16_t> previous) const;
  /// Counts a layer's overlap alone, of a token that nothing is asked of.
  void count(Looking& looking, LayerIdx layer, std::span<const std::int32_t> experts);

  /// Tokens that are alike, their weights (of sum 1), and how sure that is: the best similarity, as
  /// a share of the highest, and how many come near it (a logarithm).
  struct Found {
    std::span<const std::int32_t> columns;
    std::span<const float> weights;
    std::array<float, 2> sure{};
  };
  /// A layer has routed. Valid until the next call.
  [[nodiscard]] Found look(Looking& looking, LayerIdx layer, std::span<const std::int32_t> experts);

  /// Tokens until `column`'s experts of a layer were used again, `[E]`; 0: not in the window.
  [[nodiscard]] const std::uint8_t* next_uses(std::int32_t column, LayerIdx layer) const {
    return next_uses_.data() + future_at(column) +
           static_cast<std::size_t>(to_int(layer)) * num_experts_;
  }

  /// A finished token joins the ring, with what followed it: routes `[S, K]`, next uses `[S, E]`,
  /// and the column of the token before, −1 for none. Its column; −1 where nothing recent is kept.
  std::int32_t add(std::span<const std::int16_t> routes, std::span<const std::uint8_t> next_uses,
                   std::int32_t before);

 private:
  [[nodiscard]] std::size_t future_at(std::int32_t column) const {
    return static_cast<std::size_t>(column) * num_layers_ * num_experts_;
  }
  [[nodiscard]] std::uint8_t* used(std::size_t layer, std::int32_t expert) {
    return used_.data() + (layer * num_experts_ + static_cast<std::size_t>(expert)) * num_columns_;
  }
  void mark(std::size_t column, std::span<const std::int16_t> routes, std::uint8_t value);
  [[nodiscard]] ColumnOverlap columns_of(Looking& looking, LayerIdx layer,
                                         std::span<const std::int32_t> experts);
  /// Those that somebody has been in, to a whole block.
  [[nodiscard]] std::size_t active_columns() const;
  void follow_fitted(std::int32_t window);

  MemoryTables t_;
  std::size_t num_layers_;
  std::size_t num_experts_;
  std::size_t top_k_;
  std::size_t num_fitted_;
  std::size_t ring_ = 0;  // one column more than counts: the oldest is there as what came before
  std::size_t num_columns_ = 0;  // with some that never count, to whole blocks
  std::int64_t added_ = 0;
  std::vector<std::uint8_t> used_;       // [S, E, C]
  std::vector<std::uint8_t> next_uses_;  // [C, S, E]
  std::vector<std::int16_t> routes_;     // of the ring, [ring, S, K]
  std::vector<float> follows_;           // of the fitted, 1: the column before is the token before
  std::vector<std::int32_t> before_;     // [C], of the ring's
  std::vector<float> bias_;              // [C], −∞: does not count
  // Of a call.
  std::vector<const std::uint8_t*> rows_;
  std::vector<float> best_of_block_;
  std::vector<std::int32_t> columns_;
  std::vector<float> weights_;
};

}  // namespace sluice
