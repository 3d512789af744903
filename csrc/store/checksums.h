#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <vector>

#include "base/fork_mutex.h"
#include "store/chunk_plan.h"

namespace sluice {

/// Judges loads by their chunks' checksums, although a pack has one checksum per expert and chunks
/// are read out of order, by several threads, in loads that may be cancelled, revived or repeated.
///
/// Until an expert has been proven, a load is known by its slot, which holds one load at a time:
/// its chunks' values are kept, and the thread that brings the last one combines them. A match
/// proves the expert: its chunks' values are then known to be good, and every later value (other
/// loads under way, `kAlways`) is compared with its own. A load that had taken in a wrong chunk
/// before that is marked and refused at its next one. So no load of an expert that has a checksum
/// ends without an error unless all its chunks agree with a set that matched; what a cancelled load
/// leaves behind can cause a second look, never a wrong pass.
///
/// Allocates only while more loads of unproven experts are under way than ever before.
///
/// Thread safety: all members.
class Checksums {
 public:
  /// `expected`: one value per expert; `num_chunks`: of each expert.
  Checksums(Verify verify, std::vector<std::uint32_t> expected,
            std::span<const std::int32_t> num_chunks);

  /// Whether a chunk's value must be computed and given to `accept`. False for most reads of an
  /// expert that is proven, under kFirst; decide before the read, `accept` after it.
  [[nodiscard]] bool due(std::size_t expert) const noexcept;
  /// What one chunk says of its load.
  enum class Verdict : std::uint8_t { kGood, kMismatch };
  /// `chunks`: the expert's, in file order.
  [[nodiscard]] Verdict accept(std::size_t expert, std::span<const ReadChunk> chunks,
                               std::size_t chunk, std::uint32_t crc, const std::byte* slot);
  [[nodiscard]] std::uint32_t expected(std::size_t expert) const { return expected_[expert]; }

 private:
  enum class State : std::uint8_t { kUnproven, kProven, kProvenWithSuspects };
  struct Load {
    std::size_t expert = 0;
    const std::byte* slot = nullptr;
    bool suspect = false;  ///< holds a chunk that is known to be wrong since the expert was proven
    std::size_t num_known = 0;
    std::vector<bool> known;
    std::vector<std::uint32_t> crcs;
  };

  Load& load_locked(std::size_t expert, const std::byte* slot) REQUIRES(mu_);
  void drop_locked(Load& load) REQUIRES(mu_);
  Verdict judge_proven_locked(std::size_t expert, std::size_t chunk, std::uint32_t crc,
                              const std::byte* slot) REQUIRES(mu_);
  void prove_locked(Load& proof) REQUIRES(mu_);
  void settle_suspects_locked(std::size_t expert) REQUIRES(mu_);
  [[nodiscard]] std::span<std::uint32_t> good_locked(std::size_t expert) REQUIRES(mu_) {
    return std::span(good_).subspan(first_chunk_[expert],
                                    first_chunk_[expert + 1] - first_chunk_[expert]);
  }

  const Verify verify_;
  const std::vector<std::uint32_t> expected_;
  std::vector<std::size_t> first_chunk_;  ///< of each expert in `good_`; one more at the end
  std::unique_ptr<std::atomic<State>[]> states_;
  ForkMutex mu_;
  std::vector<std::uint32_t> good_ GUARDED_BY(mu_);  ///< per chunk, once its expert is proven
  std::vector<Load> loads_ GUARDED_BY(mu_);          ///< of unproven experts, and suspects
  std::vector<Load> spare_ GUARDED_BY(mu_);          ///< ended ones, for their memory
};

}  // namespace sluice
