#include "store/checksums.h"

#include <algorithm>
#include <utility>

#include "base/crc32c.h"

namespace sluice {

Checksums::Checksums(Verify verify, std::vector<std::uint32_t> expected)
    : verify_(verify),
      expected_(std::move(expected)),
      states_(std::make_unique<std::atomic<State>[]>(expected_.size())),
      experts_(expected_.size()) {}

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
  std::vector<Load>& loads = experts_[expert].loads;
  auto load = std::find_if(loads.begin(), loads.end(),
                           [slot](const Load& other) { return other.slot == slot; });
  if (load == loads.end()) {
    load = loads.insert(loads.end(), Load{});
    load->slot = slot;
    load->crcs.resize(chunks.size());
    load->known.resize(chunks.size());
  }
  load->crcs[chunk] = crc;
  if (!load->known[chunk]) ++load->num_known;
  load->known[chunk] = true;
  if (load->num_known < chunks.size()) return Verdict::kGood;

  std::uint32_t all = load->crcs[0];
  for (std::size_t i = 1; i < chunks.size(); ++i) {
    all = crc32c_combine(all, load->crcs[i], chunks[i].bytes);
  }
  if (all != expected_[expert]) {
    loads.erase(load);
    return Verdict::kMismatch;
  }
  prove_locked(expert, *load);
  return Verdict::kGood;
}

Checksums::Verdict Checksums::judge_proven_locked(std::size_t expert, std::size_t chunk,
                                                  std::uint32_t crc, const std::byte* slot) {
  Expert& state = experts_[expert];
  const auto suspect = std::find(state.suspects.begin(), state.suspects.end(), slot);
  const bool suspected = suspect != state.suspects.end();
  if (suspected) {
    state.suspects.erase(suspect);
    if (state.suspects.empty()) states_[expert].store(State::kProven, std::memory_order_release);
  }
  return suspected || crc != state.good[chunk] ? Verdict::kMismatch : Verdict::kGood;
}

void Checksums::prove_locked(std::size_t expert, const Load& load) {
  Expert& state = experts_[expert];
  std::vector<std::uint32_t> good = load.crcs;
  for (const Load& other : state.loads) {
    for (std::size_t i = 0; i < good.size(); ++i) {
      if (!other.known[i] || other.crcs[i] == good[i]) continue;
      state.suspects.push_back(other.slot);
      break;
    }
  }
  state.good = std::move(good);
  state.loads = {};
  states_[expert].store(state.suspects.empty() ? State::kProven : State::kProvenWithSuspects,
                        std::memory_order_release);
}

}  // namespace sluice
