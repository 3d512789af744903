#pragma once

#include <cstdint>
#include <optional>
#include <vector>

#include "engine/hint.h"

namespace sluice {

/// Guesses that wait for room on the link: bounded, best first.
///
/// Thread safety: none; the loader's lock guards it.
class HintQueue {
 public:
  static constexpr std::size_t kCapacity = 256;

  HintQueue() { hints_.reserve(kCapacity); }

  /// Adds a guess; of two for the same expert the better one stays. Returns how many guesses
  /// were dropped for it: 0, or 1 (the duplicate, or the least valuable when the queue is full).
  [[nodiscard]] int push(const Hint& hint);
  /// Takes the most probable guess out; of equals the earlier deadline, then the older one.
  [[nodiscard]] std::optional<Hint> pop();
  /// Empties the queue; returns how many guesses it held.
  std::int64_t clear();
  [[nodiscard]] bool empty() const { return hints_.empty(); }

 private:
  std::vector<Hint> hints_;  // in order of arrival
};

/// Whether `a` deserves the link before `b`.
[[nodiscard]] bool is_better(const Hint& a, const Hint& b);

}  // namespace sluice
