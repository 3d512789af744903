#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <vector>

#include "base/mutex.h"
#include "store/chunk_plan.h"

namespace sluice {

/// Judges loads by their chunks' checksums, although a pack has one checksum per expert and chunks
/// are read out of order, by several threads, in loads that may be cancelled, revived or repeated.
///
/// Until an expert has been proven, a load is known by its slot: its chunks' values are kept, and
/// the thread that brings the last one combines them. A match proves the expert: its chunks' values
/// are then known to be good, and every later value (other loads under way, `kAlways`) is compared
/// with its own. A load that had taken in a wrong chunk before is remembered by its slot and
/// refused at its next one. So no load of an expert that has a checksum ends without an error
/// unless all its chunks agree with a set that matched; what a cancelled load leaves behind can
/// cause a second look, never a wrong pass.
///
/// Thread safety: all members.
class Checksums {
 public:
  /// One value per expert.
  Checksums(Verify verify, std::vector<std::uint32_t> expected);

  /// Whether a chunk's value must be computed and given to `accept`. False for most reads of an
  /// expert that is proven, under kFirst; decide before the read, `accept` after it.
  [[nodiscard]] bool due(std::size_t expert) const noexcept;
  /// What one chunk says of its load.
  enum class Verdict : std::uint8_t { kGood, kMismatch };
  /// `chunks`: the expert's, in file order. `got`: the load's combined value, on a mismatch of all.
  [[nodiscard]] Verdict accept(std::size_t expert, std::span<const ReadChunk> chunks,
                               std::size_t chunk, std::uint32_t crc, const std::byte* slot);
  [[nodiscard]] std::uint32_t expected(std::size_t expert) const { return expected_[expert]; }

 private:
  enum class State : std::uint8_t { kUnproven, kProven, kProvenWithSuspects };
  struct Load {
    const std::byte* slot = nullptr;
    std::vector<std::uint32_t> crcs;
    std::vector<bool> known;
    std::size_t num_known = 0;
  };
  struct Expert {
    std::vector<std::uint32_t> good;         ///< per chunk, once proven
    std::vector<Load> loads;                 ///< before that
    std::vector<const std::byte*> suspects;  ///< slots that hold a chunk now known to be wrong
  };

  Verdict judge_proven_locked(std::size_t expert, std::size_t chunk, std::uint32_t crc,
                              const std::byte* slot) REQUIRES(mu_);
  void prove_locked(std::size_t expert, const Load& load) REQUIRES(mu_);

  const Verify verify_;
  const std::vector<std::uint32_t> expected_;
  std::unique_ptr<std::atomic<State>[]> states_;
  Mutex mu_;
  std::vector<Expert> experts_ GUARDED_BY(mu_);
};

}  // namespace sluice
