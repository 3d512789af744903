#include "predict/alike_tokens.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <string>
#include <utility>

#include "base/error.h"
#include "predict/scorer_parts.h"

namespace sluice {
namespace {

constexpr float kNone = -std::numeric_limits<float>::infinity();
constexpr std::size_t kBlock = ColumnOverlap::kBlock;

}  // namespace

AlikeTokens::AlikeTokens(MemoryTables tables, std::int32_t num_layers, std::int32_t num_experts,
                         std::int32_t top_k, std::int32_t window)
    : t_(std::move(tables)),
      num_layers_(static_cast<std::size_t>(num_layers)),
      num_experts_(static_cast<std::size_t>(num_experts)),
      top_k_(static_cast<std::size_t>(top_k)),
      num_fitted_(t_.sequence.size()) {
  require<ConfigError>(top_k > 0 && top_k < 256 && std::int64_t{num_layers} * top_k < 65536 &&
                           window > 0 && window < 256 && t_.recent >= 0 && t_.floor > 0,
                       [&] {
                         return "scorer: got " + std::to_string(num_layers) + " layers of top " +
                                std::to_string(top_k) + ", a window of " + std::to_string(window) +
                                " and " + std::to_string(t_.recent) +
                                " recent tokens, expected counts that fit into bytes";
                       });
  check_size("routes", t_.routes.size(),
             static_cast<std::int64_t>(table_size(num_fitted_, num_layers, top_k)));
  ring_ = t_.recent == 0 ? 0 : static_cast<std::size_t>(t_.recent) + 1;
  num_columns_ = std::max<std::size_t>((num_fitted_ + ring_ + kBlock - 1) / kBlock, 1) * kBlock;
  used_.resize(num_layers_ * num_experts_ * num_columns_);
  next_uses_.resize(num_columns_ * num_layers_ * num_experts_);
  routes_.assign(ring_ * num_layers_ * top_k_, -1);
  follows_.assign(num_fitted_, 0.0F);
  before_.assign(num_columns_, -1);
  bias_.assign(num_columns_, kNone);
  std::fill_n(bias_.begin(), num_fitted_, 0.0F);
  best_of_block_.resize(num_columns_ / kBlock);
  rows_.reserve(top_k_);
  columns_.reserve(num_columns_);
  weights_.reserve(num_columns_);
  const std::size_t wide = num_layers_ * top_k_;
  for (std::size_t column = 0; column < num_fitted_; ++column) {
    mark(column, {t_.routes.data() + column * wide, wide}, 1);
    if (column > 0 && t_.sequence[column] == t_.sequence[column - 1]) follows_[column] = 1;
  }
  follow_fitted(window);
  t_.routes = {};  // as `used_` from here on
}

void AlikeTokens::mark(std::size_t column, std::span<const std::int16_t> routes,
                       std::uint8_t value) {
  for (std::size_t i = 0; i < routes.size(); ++i) {
    const std::int16_t expert = routes[i];
    if (expert < 0 || static_cast<std::size_t>(expert) >= num_experts_) continue;
    used(i / top_k_, expert)[column] = value;
  }
}

void AlikeTokens::follow_fitted(std::int32_t window) {
  const std::size_t wide = num_layers_ * top_k_;
  for (std::size_t column = 0; column < num_fitted_; ++column) {
    std::uint8_t* const found = next_uses_.data() + column * num_layers_ * num_experts_;
    for (std::size_t ahead = 1; std::cmp_less_equal(ahead, window); ++ahead) {
      const std::size_t later = column + ahead;
      if (later >= num_fitted_ || t_.sequence[later] != t_.sequence[column]) break;
      for (std::size_t i = 0; i < wide; ++i) {
        const std::int16_t expert = t_.routes[later * wide + i];
        if (expert < 0 || static_cast<std::size_t>(expert) >= num_experts_) continue;
        std::uint8_t& next = found[i / top_k_ * num_experts_ + static_cast<std::size_t>(expert)];
        if (next == 0) next = static_cast<std::uint8_t>(ahead);
      }
    }
  }
}

void AlikeTokens::begin(Looking& looking, std::span<const std::uint16_t> previous) const {
  looking.overlap.assign(num_columns_, 0);
  looking.running.assign(num_columns_, 0.0F);
  looking.base.assign(bias_.begin(), bias_.end());
  looking.scale = 0;
  if (previous.empty()) return;
  const float share = t_.previous / static_cast<float>(num_layers_ * top_k_);
  for (std::size_t c = 1; c < num_fitted_; ++c) {
    looking.base[c] += static_cast<float>(previous[c - 1]) * (follows_[c] * share);
  }
  for (std::size_t c = num_fitted_; c < active_columns(); ++c) {
    if (before_[c] < 0) continue;
    looking.base[c] += static_cast<float>(previous[static_cast<std::size_t>(before_[c])]) * share;
  }
}

std::size_t AlikeTokens::active_columns() const {
  const std::size_t ring = std::min(static_cast<std::size_t>(added_), ring_);
  const std::size_t blocks = (num_fitted_ + ring + kBlock - 1) / kBlock;
  return std::max<std::size_t>(blocks, 1) * kBlock;
}

ColumnOverlap AlikeTokens::columns_of(Looking& looking, LayerIdx layer,
                                      std::span<const std::int32_t> experts) {
  rows_.clear();
  for (const std::int32_t expert : experts) {
    if (expert < 0 || static_cast<std::size_t>(expert) >= num_experts_) continue;
    rows_.push_back(used(static_cast<std::size_t>(to_int(layer)), expert));
  }
  return {.rows = rows_.data(),
          .num_rows = rows_.size(),
          .num_columns = active_columns(),
          .overlap = looking.overlap.data()};
}

void AlikeTokens::count(Looking& looking, LayerIdx layer, std::span<const std::int32_t> experts) {
  count_overlap(columns_of(looking, layer, experts));
}

AlikeTokens::Found AlikeTokens::look(Looking& looking, LayerIdx layer,
                                     std::span<const std::int32_t> experts) {
  looking.scale = looking.scale * t_.fade + 1;
  const float by = t_.running / looking.scale;
  compare_columns(columns_of(looking, layer, experts), {.base = looking.base.data(),
                                                        .faded = looking.running.data(),
                                                        .best_of_block = best_of_block_.data(),
                                                        .fade = t_.fade,
                                                        .each = 1.0F / static_cast<float>(top_k_),
                                                        .by = by});
  const std::size_t blocks = active_columns() / kBlock;
  const float best = *std::max_element(
      best_of_block_.begin(), best_of_block_.begin() + static_cast<std::ptrdiff_t>(blocks));
  columns_.clear();
  weights_.clear();
  if (best == kNone) return {.columns = {}, .weights = {}, .sure = {0, std::log(t_.floor) / 8}};
  const float least = best + std::log(t_.floor);
  float total = 0;
  for (std::size_t block = 0; block < blocks; ++block) {
    if (best_of_block_[block] < least) continue;
    for (std::size_t c = block * kBlock; c < (block + 1) * kBlock; ++c) {
      const float likely = looking.base[c] + looking.running[c] * by;
      if (likely < least) continue;
      columns_.push_back(static_cast<std::int32_t>(c));
      weights_.push_back(std::exp(likely - best));
      total += weights_.back();
    }
  }
  for (float& weight : weights_) weight /= total;
  return {.columns = columns_,
          .weights = weights_,
          .sure = {std::max(best, 0.0F) / (t_.running + t_.previous), std::log(total) / 8}};
}

std::int32_t AlikeTokens::add(std::span<const std::int16_t> routes,
                              std::span<const std::uint8_t> next_uses, std::int32_t before) {
  if (ring_ == 0) return -1;
  const std::size_t place = static_cast<std::size_t>(added_) % ring_;
  const std::size_t column = num_fitted_ + place;
  ++added_;
  for (std::size_t c = num_fitted_; c < num_columns_; ++c) {
    if (std::cmp_equal(before_[c], column)) before_[c] = -1;
  }
  const std::span<std::int16_t> own(routes_.data() + place * num_layers_ * top_k_,
                                    num_layers_ * top_k_);
  mark(column, own, 0);
  std::copy(routes.begin(), routes.end(), own.begin());
  mark(column, own, 1);
  std::copy(next_uses.begin(), next_uses.end(),
            next_uses_.begin() +
                static_cast<std::ptrdiff_t>(future_at(static_cast<std::int32_t>(column))));
  before_[column] = before;
  bias_[column] = 0;
  if (added_ > t_.recent) {  // the next column to be written is the oldest
    bias_[num_fitted_ + static_cast<std::size_t>(added_) % ring_] = kNone;
  }
  return static_cast<std::int32_t>(column);
}

}  // namespace sluice
