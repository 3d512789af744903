#include "engine/layer_run.h"

#include <algorithm>
#include <chrono>
#include <new>
#include <string>
#include <utility>

#include "base/error.h"
#include "engine/hint_queue.h"

namespace sluice {
namespace {

constexpr std::chrono::milliseconds kSlice{50};  // between two questions whether to stop
constexpr std::chrono::milliseconds kSoon{1};

ExpertWeights weights_at(const ExpertLayout& layout, const std::byte* slot) {
  const auto bias = [&](std::size_t offset) {
    return layout.has_bias ? reinterpret_cast<const float*>(slot + offset) : nullptr;
  };
  return {.w13 = slot,
          .w2 = slot + layout.w2_offset(),
          .b13 = bias(layout.b13_offset()),
          .b2 = bias(layout.b2_offset())};
}

ExpertWeights weights_at(const ExpertStore::InPlace& in_place) {
  return {.w13 = in_place.w13,
          .w2 = in_place.w2,
          .b13 = reinterpret_cast<const float*>(in_place.b13),
          .b2 = reinterpret_cast<const float*>(in_place.b2)};
}

}  // namespace

LayerRun::LayerRun(Parts parts) : parts_(std::move(parts)) {
  std::size_t most = 0;
  for (std::int32_t l = 0; l < parts_.store.num_layers(); ++l) {
    most = std::max(most, static_cast<std::size_t>(parts_.store.layer(LayerIdx{l}).num_experts));
  }
  needs_.reserve(most);
  unplaced_.reserve(most);
  ready_.reserve(most);
  batch_.reserve(most);
  batch_needs_.reserve(most);
  landings_.reserve(most);
  slot_experts_.reserve(most);
  grants_.reserve(most);
  judged_.reserve(most);
  tokens_of_.reserve(most);
  hints_.reserve(most);
  ring_.reserve(most);
}

ExpertKey LayerRun::key_of(const Need& need) const {
  return {args_->layer, ExpertIdx{need.group->expert}};
}

// Counts the time also of work that throws.
template <class Work>
void LayerRun::timed(SpanKind kind, std::int32_t expert, std::int64_t tokens, Work work) {
  struct Count {
    LayerRun& run;
    Span span;
    ~Count() {
      span.end = run.parts_.clock.now();
      const bool stalled = span.kind == SpanKind::kStall;
      (stalled ? run.report_.stall_ns : run.report_.compute_ns) += span.end - span.begin;
      run.parts_.timeline.add(span);
    }
  };
  const ExpertKey key{args_->layer, ExpertIdx{expert}};
  const Timeline::Shown shown(parts_.timeline, kind, key);
  const Count count{*this,
                    {.kind = kind,
                     .begin = parts_.clock.now(),
                     .end = 0,
                     .key = key,
                     .bytes = 0,
                     .tokens = static_cast<std::int32_t>(tokens)}};
  work();
}

void LayerRun::run(const ForwardArgs& args, const LayerSpec& spec) {
  args_ = &args;
  layer_ = &parts_.store.layer(args.layer);
  report_ = {.num_tokens = args.num_tokens};
  asked_at_ = parts_.clock.now();
  grouping_ = &parts_.compute.begin(args, *layer_, spec);
  try {
    open(args);
    const bool few = args.num_tokens <= Scorer::kMostRows;
    if (few) rank();
    place_all();
    if (!few) rank();
    if (!report_.streamed) foresee();
    while (num_computed_ < needs_.size()) {
      collect();
      if (!compute_ready()) stall();
    }
    timed(SpanKind::kCombine, -1, args.num_tokens, [&] { parts_.compute.combine_rows(); });
  } catch (...) {
    landings_.clear();
    grants_.clear();
    for (Need& each : needs_) {
      if (each.grant.lease) grants_.push_back(std::move(each.grant));
    }
    try {
      parts_.loader.give_back(grants_, args.layer, args.stream);
    } catch (const DeviceError&) {  // the call ends by its own error
    }
    report_.generic_gate_calls = parts_.compute.generic_gate_calls();
    report_.scorers_lost = scorers_lost_;
    parts_.loader.abandon_call(report_);
    throw;
  }
  report_.generic_gate_calls = parts_.compute.generic_gate_calls();
  report_.scorers_lost = scorers_lost_;
  parts_.loader.end_call(report_);
  if (parts_.warms && has_ring_) warm();
}

// Decode goes on where a prompt ends. What went through the ring is gone; of the experts that the
// prompt used most, as many as are this layer's share of the slots, those that are not here are
// guessed: they come when the link is idle, if the policy wants them.
void LayerRun::warm() {
  hints_.clear();
  const auto share =
      static_cast<std::size_t>(parts_.loader.num_slots(args_->layer) * layer_->num_experts /
                               parts_.loader.num_experts(args_->layer));
  for (const Need& each : needs_) {
    hints_.push_back({.key = key_of(each),
                      .probability = static_cast<double>(each.group->count) /
                                     static_cast<double>(args_->num_tokens * args_->top_k)});
  }
  const auto last = hints_.begin() + static_cast<std::ptrdiff_t>(std::min(share, hints_.size()));
  std::partial_sort(hints_.begin(), last, hints_.end(), is_better);
  hints_.erase(last, hints_.end());
  parts_.loader.hint_absent(hints_);
}

std::int64_t LayerRun::add_scorer(std::unique_ptr<Scorer> scorer) {
  scorers_.emplace_back(++last_scorer_, std::move(scorer));
  return last_scorer_;
}

void LayerRun::remove_scorer(std::int64_t number) {
  std::erase_if(scorers_, [&](const auto& each) { return each.first == number; });
}

void LayerRun::begin_step(const StepRows& rows) {
  ask_scorers([&](Scorer& scorer) { scorer.begin_step(rows); });
}

// Asks every scorer; one that runs out of memory is asked no more, and the call goes on.
template <class Ask>
void LayerRun::ask_scorers(Ask ask) {
  std::erase_if(scorers_, [&](const auto& each) {
    try {
      ask(*each.second);
      return false;
    } catch (const std::bad_alloc&) {
      ++scorers_lost_;
      return true;
    }
  });
}

// Before demands take their slots, so that victims are chosen by what this layer's routes say.
void LayerRun::rank() {
  ask_scorers([&](Scorer& scorer) {
    const LayerScores ranked = scorer.rank(*args_);
    if (!ranked.scores.empty()) parts_.loader.publish(ranked.first_layer, ranked.scores, 0);
  });
}

// Guesses what comes while this call's loads are on their way.
void LayerRun::foresee() {
  if (scorers_.empty()) return;
  const Nanos now = asked_at_;  // when the call began
  if (began_at_ != 0) {
    Nanos between = now - began_at_;
    if (between_calls_ != 0) {  // a pause between two texts says nothing of calls
      between = between_calls_ + (std::min(between, 4 * between_calls_) - between_calls_) / 8;
    }
    between_calls_ = between;
  }
  began_at_ = now;
  guesses_.clear();
  ask_scorers([&](Scorer& scorer) { scorer.guess(*args_, *grouping_, guesses_); });
  hints_.clear();
  for (const LayerGuess& guess : guesses_) {
    hints_.push_back(
        {.key = guess.key,
         .probability = guess.probability,
         .deadline = between_calls_ == 0 ? kNever : now + guess.layers_ahead * between_calls_});
  }
  parts_.loader.hint_absent(hints_);
}

void LayerRun::open(const ForwardArgs& args) {
  const auto groups = grouping_->groups();
  needs_.clear();
  unplaced_.clear();
  ready_.clear();
  ring_.clear();
  landings_.clear();
  slot_experts_.clear();
  num_computed_ = 0;
  retry_soon_ = false;
  needs_.resize(groups.size());
  batch_needs_.clear();  // for now: the needs that live in slots
  for (std::size_t i = 0; i < groups.size(); ++i) {
    needs_[i].group = &groups[i];
    const auto in_place = parts_.use_in_place ? parts_.store.in_place(key_of(needs_[i]))
                                              : std::optional<ExpertStore::InPlace>{};
    if (in_place) {
      needs_[i].weights = weights_at(*in_place);
      needs_[i].state = Need::State::kReady;
      ready_.push_back(static_cast<std::int32_t>(i));
      ++report_.in_place_hits;
    } else {
      slot_experts_.push_back(ExpertIdx{groups[i].expert});
      batch_needs_.push_back(static_cast<std::int32_t>(i));
    }
  }
  grants_.clear();
  grants_.resize(slot_experts_.size());
  judged_.assign(slot_experts_.size(), ExpertLoader::Judgement::kMiss);
  const auto num_experts = static_cast<std::int64_t>(layer_->num_experts);
  report_.streamed = 2 * static_cast<std::int64_t>(needs_.size()) > num_experts;
  tokens_of_.clear();
  if (report_.streamed) {
    for (const std::int32_t idx : batch_needs_) tokens_of_.push_back(need(idx).group->count);
  }
  parts_.loader.begin_call(args.layer, slot_experts_, batch_needs_, grants_, judged_, tokens_of_,
                           args.num_tokens);
  for (std::size_t i = 0; i < slot_experts_.size(); ++i) {
    const std::int32_t idx = batch_needs_[i];
    switch (judged_[i]) {
      case ExpertLoader::Judgement::kHit:
        mark_ready(idx, std::move(grants_[i]));
        break;
      case ExpertLoader::Judgement::kLate:
        need(idx).state = Need::State::kLoading;
        break;
      case ExpertLoader::Judgement::kMiss:
        unplaced_.push_back(idx);
        break;
    }
  }

  has_ring_ = false;
  if (slot_experts_.empty()) return;
  const std::int64_t num_slots = parts_.loader.num_slots(args.layer);
  has_ring_ = parts_.streams && report_.streamed && 4 * num_slots >= num_experts;
  ring_limit_ = static_cast<std::size_t>(std::max<std::int64_t>(2, (num_slots + 7) / 8));
  ring_next_ = 0;
  if (report_.streamed) {
    std::sort(unplaced_.begin(), unplaced_.end(), [&](std::int32_t a, std::int32_t b) {
      const std::int64_t waiting_a = need(a).group->count;
      const std::int64_t waiting_b = need(b).group->count;
      return waiting_a != waiting_b ? waiting_a > waiting_b : a < b;
    });
  }
}

void LayerRun::mark_ready(std::int32_t idx, Grant grant) {
  Need& each = need(idx);
  each.grant = std::move(grant);
  each.slot = each.grant.lease.slot();
  each.weights = weights_at(layer_->layout, each.grant.data);
#if !defined(SLUICE_PLANT_I3)
  parts_.device.wait(args_->stream, each.grant.ready);
#endif
  each.state = Need::State::kReady;
  ready_.push_back(idx);
}

void LayerRun::mark_computed(std::span<const std::int32_t> computed) {
  grants_.clear();
  for (const std::int32_t idx : computed) {
    Need& each = need(idx);
    if (each.grant.lease) grants_.push_back(std::move(each.grant));
    each.state = Need::State::kComputed;
  }
  num_computed_ += computed.size();
  parts_.loader.give_back(grants_, args_->layer, args_->stream);
}

// Takes what has landed; ends the call with the first failure's own error.
void LayerRun::collect() {
  parts_.loader.take_landings(landings_);
  std::exception_ptr error;
  bool again = false;
  for (Landing& landing : landings_) {
    if (landing.state == TicketState::kDone) {
      mark_ready(landing.need, std::move(landing.grant));
    } else {
      // A guess was cancelled just before this call joined it: its expert is a miss after all.
      need(landing.need).state = Need::State::kUnplaced;
      unplaced_.push_back(landing.need);
      again = true;
      if (landing.state == TicketState::kFailed && !error) error = landing.error;
    }
  }
  landings_.clear();
  if (error) std::rethrow_exception(error);
  if (again || (!unplaced_.empty() && retry_soon_)) place_all();
}

// Everything that is ready: few-token experts at once, the others one by one, so that slots come
// free early. False when nothing was.
bool LayerRun::compute_ready() {
  if (ready_.empty()) return false;
  batch_.clear();
  batch_needs_.clear();
  std::int64_t rows = 0;
  std::size_t others = 0;
  for (const std::int32_t idx : ready_) {
    const Need& each = need(idx);
    if (parts_.compute.takes_several(*each.group)) {
      batch_.push_back({.group = each.group, .weights = each.weights});
      batch_needs_.push_back(idx);
      rows += each.group->count;
    } else {
      ready_[others++] = idx;
    }
  }
  ready_.resize(others);
  if (!batch_.empty()) {
    const std::int32_t expert = batch_.size() == 1 ? batch_.front().group->expert : -1;
    timed(SpanKind::kCompute, expert, rows, [&] { parts_.compute.several(batch_); });
    mark_computed(batch_needs_);
    if (!unplaced_.empty()) place_all();
  } else {
    const std::int32_t idx = ready_.front();
    ready_.erase(ready_.begin());
    compute_one(idx);
    if (!unplaced_.empty()) place_all();
  }
  return true;
}

void LayerRun::compute_one(std::int32_t idx) {
  const Need& each = need(idx);
  timed(SpanKind::kCompute, each.group->expert, each.group->count,
        [&] { parts_.compute.one({.group = each.group, .weights = each.weights}); });
  mark_computed({&idx, 1});
}

// Nothing is ready: waits until a load ends, and asks now and then whether to stop.
void LayerRun::stall() {
  ExpertLoader& loader = parts_.loader;
  timed(SpanKind::kStall, -1, 0, [&] {
    for (;;) {
      const std::uint64_t seen = loader.epoch();
      collect();
      if (!ready_.empty()) return;
      if (!unplaced_.empty()) place_all();
      require<InternalError>(loader.may_end(seen) || retry_soon_ || !ready_.empty(), [&] {
        return "forward of " + layer_->name + ": " + std::to_string(unplaced_.size()) +
               " experts got no slot while nothing was in flight, expected "
               "slots to come free; are leases held outside of the call?";
      });
      if (!ready_.empty()) return;
      loader.step();
      loader.wait(seen, retry_soon_ ? kSoon : kSlice);
      const Nanos now = parts_.clock.now();
      if (!parts_.asks_each_time && now - asked_at_ < std::chrono::nanoseconds(kSlice).count()) {
        continue;
      }
      asked_at_ = now;
      if (parts_.interrupted && parts_.interrupted()) {
        throw Interrupted("forward of " + layer_->name + ": interrupted while waiting for bytes");
      }
    }
  });
}

}  // namespace sluice
