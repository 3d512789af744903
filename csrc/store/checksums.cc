#include "store/checksums.h"

#include <algorithm>
#include <utility>

#include "base/crc32c.h"

namespace sluice {

Checksums::Checksums(Verify verify, std::vector<std::uint32_t> expected,
                     std::span<const std::int32_t> num_chunks)
    : verify_(verify),
      expected_(std::move(expected)),
      first_chunk_(1, 0),
      states_(std::make_unique<std::atomic<State>[]>(expected_.size())) {
  for (const std::int32_t chunks : num_chunks) {
    first_chunk_.push_back(first_chunk_.back() + static_cast<std::size_t>(chunks));
  }
  good_.resize(first_chunk_.back());
}

bool Checksums::due(std::size_t expert) const noexcept {
  if (verify_ == Verify::kOff) return false;
  if (verify_ == Verify::kAlways) return true;
  return states_[expert].load(std::memory_order_acquire) != State::kProven;
}

Checksums::Verdict Checksums::accept(std::size_t expert, std::span<const ReadChunk> chunks,
                                     std::size_t chunk, std::uint32_t crc, const std::byte* slot) {
  const MutexLock lock(mu_);
  if (states_[expert].load(std::memory_order_relaxed) != State::kUnproven) {
    return judge_proven_locked(expert, chunk, crc, slot);
  }
  Load& load = load_locked(expert, slot);
  load.crcs[chunk] = crc;
  if (!load.known[chunk]) ++load.num_known;
  load.known[chunk] = true;
  if (load.num_known < chunks.size()) return Verdict::kGood;

  std::uint32_t all = load.crcs[0];
  for (std::size_t i = 1; i < chunks.size(); ++i) {
    all = crc32c_combine(all, load.crcs[i], chunks[i].bytes);
  }
  if (all != expected_[expert]) {
    drop_locked(load);
    return Verdict::kMismatch;
  }
  prove_locked(load);
  return Verdict::kGood;
}

// The load that fills `slot`. What the slot held of another expert is over.
Checksums::Load& Checksums::load_locked(std::size_t expert, const std::byte* slot) {
  const auto found = std::find_if(loads_.begin(), loads_.end(),
                                  [slot](const Load& load) { return load.slot == slot; });
  if (found != loads_.end()) {
    if (found->expert == expert) return *found;
    drop_locked(*found);
  }
  if (spare_.empty()) spare_.emplace_back();
  Load load = std::move(spare_.back());
  spare_.pop_back();
  const std::size_t num_chunks = first_chunk_[expert + 1] - first_chunk_[expert];
  load.expert = expert;
  load.slot = slot;
  load.suspect = false;
  load.num_known = 0;
  load.known.assign(num_chunks, false);
  load.crcs.assign(num_chunks, 0);
  loads_.push_back(std::move(load));
  return loads_.back();
}

void Checksums::drop_locked(Load& load) {
  const std::size_t expert = load.expert;
  const bool suspect = load.suspect;
  spare_.push_back(std::move(load));
  if (&load != &loads_.back()) load = std::move(loads_.back());
  loads_.pop_back();
  if (suspect) settle_suspects_locked(expert);
}

Checksums::Verdict Checksums::judge_proven_locked(std::size_t expert, std::size_t chunk,
                                                  std::uint32_t crc, const std::byte* slot) {
  const auto suspect = std::find_if(loads_.begin(), loads_.end(), [&](const Load& load) {
    return load.slot == slot && load.expert == expert;
  });
  if (suspect != loads_.end()) {
    drop_locked(*suspect);
    return Verdict::kMismatch;
  }
  return crc == good_locked(expert)[chunk] ? Verdict::kGood : Verdict::kMismatch;
}

// Keeps the values of `proof`; of the expert's other loads only those stay that disagree.
void Checksums::prove_locked(Load& proof) {
  const std::size_t expert = proof.expert;
  const std::span<std::uint32_t> good = good_locked(expert);
  std::copy(proof.crcs.begin(), proof.crcs.end(), good.begin());
  drop_locked(proof);
  for (std::size_t i = loads_.size(); i-- > 0;) {
    Load& other = loads_[i];
    if (other.expert != expert) continue;
    for (std::size_t c = 0; c < good.size(); ++c) {
      if (other.known[c] && other.crcs[c] != good[c]) other.suspect = true;
    }
    if (!other.suspect) drop_locked(other);
  }
  settle_suspects_locked(expert);
}

void Checksums::settle_suspects_locked(std::size_t expert) {
  const bool any = std::any_of(loads_.begin(), loads_.end(), [expert](const Load& load) {
    return load.expert == expert && load.suspect;
  });
  states_[expert].store(any ? State::kProvenWithSuspects : State::kProven,
                        std::memory_order_release);
}

}  // namespace sluice
