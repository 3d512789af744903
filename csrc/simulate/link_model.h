#pragma once

#include <algorithm>
#include <cstdint>
#include <deque>
#include <utility>

#include "base/clock.h"
#include "transfer/link.h"

namespace sluice {

/// What a link takes for a chunk: t0 + bytes / rate, one chunk after the other.
struct LinkRates {
  double bytes_per_second = 0;
  double seconds_per_chunk = 0;  ///< t0
  int depth = 4;                 ///< chunks that may be started ahead
};

/// A link without bytes, on a virtual clock: what was started lands when its time has passed.
///
/// Thread safety: none; whoever moves the clock moves the link.
class LinkModel final : public Link {
 public:
  /// `bytes_per_byte`: what one byte of a chunk stands for.
  LinkModel(LinkRates rates, double bytes_per_byte, VirtualClock& clock)
      : rates_(rates), bytes_per_byte_(bytes_per_byte), clock_(clock) {}

  [[nodiscard]] int depth() const override { return rates_.depth; }
  void set_landed(Landed landed) override { landed_ = std::move(landed); }
  void start(const ChunkCopy& copy) override {
    const double bytes = static_cast<double>(copy.bytes) * bytes_per_byte_;
    const double seconds = rates_.seconds_per_chunk + bytes / rates_.bytes_per_second;
    free_at_ = std::max(free_at_, clock_.now()) + static_cast<Nanos>(seconds * 1e9);
    chunks_.push_back({copy.token, static_cast<std::uint64_t>(bytes), free_at_});
  }
  void close() override {}

  /// Lets time pass; what lands meanwhile lands at its own time.
  void advance(Nanos nanos) {
    const Nanos end = clock_.now() + nanos;
    while (!chunks_.empty() && chunks_.front().lands_at <= end) land();
    clock_.advance(end - clock_.now());
  }
  /// Lets time pass until the next chunk has landed. False when none is on its way.
  bool land_next() {
    if (chunks_.empty()) return false;
    land();
    return true;
  }

 private:
  struct Chunk {
    std::uint64_t token = 0;
    std::uint64_t bytes = 0;
    Nanos lands_at = 0;
  };
  void land() {
    const Chunk chunk = chunks_.front();
    chunks_.pop_front();
    clock_.advance(std::max<Nanos>(0, chunk.lands_at - clock_.now()));
    landed_(chunk.token, nullptr, chunk.bytes);
  }

  LinkRates rates_;
  double bytes_per_byte_;
  VirtualClock& clock_;
  Landed landed_;
  Nanos free_at_ = 0;
  std::deque<Chunk> chunks_;  // in the order in which they land
};

}  // namespace sluice
