#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "engine/hint.h"

namespace sluice {

/// Guesses that wait for room on the link, as jobs of one length each: bounded, the earliest
/// deadline first (2609.12978), of equals the most probable, then the older one. Guesses of a pass
/// so fill slots in the order in which layers run (2410.17954 §3.4).
///
/// Thread safety: none; the loader's lock guards it.
class HintQueue {
 public:
  static constexpr std::size_t kCapacity = 256;

  HintQueue();

  /// Adds a guess; two for the same expert become one, of the higher probability and the later
  /// deadline. Returns how many guesses were dropped for it: 0, or 1 (the duplicate, or the least
  /// valuable when the queue is full).
  [[nodiscard]] int push(const Hint& hint);
  /// Drops what cannot begin before its deadline when the link takes `load_time` for an expert and
  /// begins the next one `now`: of those that would be in time without it, the least probable goes,
  /// so what stays is worth the most that can be. Begin, not end: a load that a demand finds on its
  /// way saves a part. Returns how many were dropped.
  [[nodiscard]] int drop_late(Nanos now, Nanos load_time);
  /// The first guess; there is one.
  [[nodiscard]] const Hint& front() const { return hints_.front(); }
  /// Takes it out.
  void pop() { hints_.erase(hints_.begin()); }
  /// Empties the queue; returns how many guesses it held.
  std::int64_t clear();
  [[nodiscard]] bool empty() const { return hints_.empty(); }

 private:
  void insert(const Hint& hint);

  std::vector<Hint> hints_;  // in the order in which they are taken
  // Of drop_late, kept so that it allocates nothing.
  std::vector<std::size_t> taken_;  // a heap, the least probable on top
  std::vector<bool> late_;          // beside hints_
};

/// Whether `a` deserves the link more than `b`: more probable, then due earlier.
[[nodiscard]] bool is_better(const Hint& a, const Hint& b);

}  // namespace sluice
