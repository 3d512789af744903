#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <span>
#include <utility>
#include <vector>

#include "engine/compute.h"
#include "engine/expert_loader.h"
#include "engine/grouping.h"
#include "engine/hint.h"
#include "engine/scorer.h"

namespace sluice {

/// One layer's forward, from grouped rows to computed ones: which miss gets a slot next, what is
/// computed while bytes are on their way, and when the caller has to wait.
///
/// A call that needs more than half of its layer's experts streams: it takes free slots and a ring
/// of max(2, ⌈S/8⌉) others, experts in order of tokens waiting, so that the cache survives a
/// prefill; where S < E/4 the ring is the whole pool. Every other call takes what slots it can get,
/// experts in ascending order. More experts than slots make waves. None of it changes results.
///
/// Thread safety: one call at a time, on its thread.
class LayerRun {
 public:
  struct Parts {
    const ExpertStore& store;
    Device& device;
    const Clock& clock;
    Timeline& timeline;
    ExpertLoader& loader;
    ExpertCompute& compute;
    std::function<bool()> interrupted;
    bool use_in_place = false;    ///< adopted experts are read where they lie
    bool streams = true;          ///< calls of more than half of a layer go through a ring
    bool warms = false;           ///< after such a call the experts it used most are guessed
    bool asks_each_time = false;  ///< `interrupted` is asked at each stall: no threads, no clock
  };
  explicit LayerRun(Parts parts);

  /// Errors: the first failed load's own error, Interrupted, what a callback throws; the session
  /// works on, every lease is returned.
  void run(const ForwardArgs& args, const LayerSpec& spec);
  /// From the next call on; null: nobody guesses.
  std::int64_t add_scorer(std::unique_ptr<Scorer> scorer);
  void remove_scorer(std::int64_t number);
  void begin_step(const StepRows& rows);

 private:
  struct Need {
    const Grouping::Group* group = nullptr;
    enum class State : std::uint8_t { kUnplaced, kLoading, kReady, kComputed };
    State state = State::kUnplaced;
    SlotIdx slot{};
    Grant grant;
    ExpertWeights weights;
  };
  struct RingSlot {
    SlotIdx slot{};
    std::int32_t need = -1;
  };

  void open(const ForwardArgs& args);
  void place_all();
  /// `num_waiting`: misses without a slot, this one included.
  ExpertLoader::Placement place_one(std::int32_t idx, std::int32_t num_waiting);
  [[nodiscard]] RingSlot* idle_ring_slot();
  void collect();
  bool compute_ready();
  void compute_one(std::int32_t idx);
  void mark_ready(std::int32_t idx, Grant grant);
  void mark_computed(std::span<const std::int32_t> computed);
  void stall();
  void warm();
  template <class Ask>
  void ask_scorers(Ask ask);
  void rank();
  void foresee();
  [[nodiscard]] Need& need(std::int32_t idx) { return needs_[static_cast<std::size_t>(idx)]; }
  [[nodiscard]] ExpertKey key_of(const Need& need) const;
  template <class Work>
  void timed(SpanKind kind, std::int32_t expert, std::int64_t tokens, Work work);

  Parts parts_;
  const Grouping* grouping_ = nullptr;
  const ForwardArgs* args_ = nullptr;
  const StoredLayer* layer_ = nullptr;
  ExpertLoader::CallReport report_;
  std::size_t num_computed_ = 0;
  Nanos asked_at_ = 0;
  bool retry_soon_ = false;

  bool has_ring_ = false;
  std::size_t ring_limit_ = 0;
  std::size_t ring_next_ = 0;
  std::vector<RingSlot> ring_;

  std::vector<Need> needs_;
  std::vector<std::int32_t> unplaced_;  // in the order of their loads
  std::vector<std::int32_t> ready_;
  std::vector<ReadyExpert> batch_;
  std::vector<std::int32_t> batch_needs_;
  std::vector<Landing> landings_;
  std::vector<std::int64_t> tokens_of_;  // of a prompt, by slot_experts_
  std::vector<Hint> hints_;
  std::vector<std::pair<std::int64_t, std::unique_ptr<Scorer>>> scorers_;  // by number
  std::int64_t last_scorer_ = 0;
  std::int64_t scorers_lost_ = 0;  // for want of memory
  std::vector<LayerGuess> guesses_;
  Nanos began_at_ = 0;                   // the last call that was not a prompt's
  Nanos between_calls_ = 0;              // the usual time from one to the next
  std::vector<ExpertIdx> slot_experts_;  // of begin_call, with the needs they belong to
  std::vector<Grant> grants_;            // of begin_call; later those that go back together
  std::vector<ExpertLoader::Judgement> judged_;
};

}  // namespace sluice
