#pragma once

#include <algorithm>
#include <cstddef>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "base/error.h"
#include "cache/policy.h"

namespace sluice {

/// The families behind `make_policy`, one file each.
[[nodiscard]] std::unique_ptr<Policy> make_lru_policy(PolicyShape shape);
[[nodiscard]] std::unique_ptr<Policy> make_fifo_policy(PolicyShape shape);
[[nodiscard]] std::unique_ptr<Policy> make_lfu_policy(PolicyShape shape);
[[nodiscard]] std::unique_ptr<Policy> make_lfru_policy(PolicyShape shape);
[[nodiscard]] std::unique_ptr<Policy> make_least_stale_policy(PolicyShape shape);
[[nodiscard]] std::unique_ptr<Policy> make_plec_policy(PolicyShape shape);
[[nodiscard]] std::unique_ptr<Policy> make_s3_fifo_policy(PolicyShape shape);
[[nodiscard]] std::unique_ptr<Policy> make_static_policy(PolicyShape shape);
/// `judged`: keep-scores rule only while a shadow cache says that they are worth it.
[[nodiscard]] std::unique_ptr<Policy> make_forecast_policy(PolicyShape shape, bool judged);
/// `half_life`: steps after which a use counts half.
[[nodiscard]] std::unique_ptr<Policy> make_decayed_lfu_policy(PolicyShape shape, double half_life);

/// How far an expert's layer is from its next turn.
enum class EdgeFormula : std::uint8_t { kOurs, kPrinted };
[[nodiscard]] std::unique_ptr<Policy> make_edge_policy(PolicyShape shape, EdgeFormula formula);

/// One value per expert of every layer.
template <class T>
class PerExpert {
 public:
  PerExpert(PolicyShape shape, T initial)
      : shape_(shape),
        values_(static_cast<std::size_t>(shape.num_layers) *
                    static_cast<std::size_t>(shape.max_experts),
                initial) {}

  /// Errors: InternalError when the expert lies outside of the shape.
  [[nodiscard]] T& operator[](ExpertKey key) { return values_[position(key)]; }
  [[nodiscard]] const T& operator[](ExpertKey key) const { return values_[position(key)]; }
  /// Of one layer, by expert.
  [[nodiscard]] std::span<T> layer(LayerIdx layer) {
    return std::span(values_).subspan(position({layer, ExpertIdx{0}}),
                                      static_cast<std::size_t>(shape_.max_experts));
  }

 private:
  [[nodiscard]] std::size_t position(ExpertKey key) const {
    const std::int32_t layer = to_int(key.layer);
    const std::int32_t expert = to_int(key.expert);
    require<InternalError>(
        layer >= 0 && layer < shape_.num_layers && expert >= 0 && expert < shape_.max_experts, [&] {
          return "policy: got " + describe(key) + ", expected layers below " +
                 std::to_string(shape_.num_layers) + " and experts below " +
                 std::to_string(shape_.max_experts);
        });
    return static_cast<std::size_t>(layer) * static_cast<std::size_t>(shape_.max_experts) +
           static_cast<std::size_t>(expert);
  }

  PolicyShape shape_;
  std::vector<T> values_;
};

/// Who was brought by a guess and waits for its layer to run. Until then it is worth what it would
/// be if the guess came true: else what was brought ahead would be the next to leave.
class Guessed {
 public:
  explicit Guessed(PolicyShape shape) : waits_(shape, 0) {}

  void on_load(ExpertKey key, bool guessed) { waits_[key] = guessed ? 1 : 0; }
  void on_event(const CacheEvent& event) {
    for (char& each : waits_.layer(event.layer)) each = 0;
  }
  [[nodiscard]] bool operator[](ExpertKey key) const { return waits_[key] != 0; }

 private:
  PerExpert<char> waits_;
};

/// The candidate with the smallest `keep_score(key)`; of equals the highest id leaves.
template <class KeepScore>
[[nodiscard]] std::size_t least_kept(std::span<const Candidate> candidates,
                                     KeepScore&& keep_score) {
  std::size_t worst = 0;
  auto worst_score = keep_score(candidates[0].key);
  for (std::size_t i = 1; i < candidates.size(); ++i) {
    const auto score = keep_score(candidates[i].key);
    if (score < worst_score ||
        (score == worst_score && candidates[i].key > candidates[worst].key)) {
      worst = i;
      worst_score = score;
    }
  }
  return worst;
}

}  // namespace sluice
