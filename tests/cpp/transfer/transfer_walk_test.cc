// A random walk of slot cache and transfer engine, wired as the engine wires them, against a plain
// model: after every step both must say the same of every slot, ticket and chunk.
#include <gtest/gtest.h>

#include <array>
#include <cstring>
#include <iostream>
#include <memory>
#include <random>
#include <stdexcept>

#include "support/coverage.h"
#include "support/seed.h"
#include "support/stepped_link.h"
#include "transfer/walk_model.h"

namespace sluice {
namespace {

using testing::Coverage;
using testing::ModelRequest;
using testing::PolicyModel;
using testing::SteppedLink;

constexpr std::int32_t kLayers = 3;
constexpr std::int32_t kExperts = 7;
constexpr std::int32_t kSlots = 7;
constexpr int kDepth = 4;
constexpr int kHintDepth = 2;
constexpr std::int32_t kMaxChunks = 4;
constexpr int kStepsPerPolicy = 60'000;

const std::vector<std::string> kRows = {
    "slot kEmpty -> kLoading",
    "slot kLoading -> kReady",
    "slot kLoading -> kEmpty, failed",
    "slot kLoading -> kEmpty, cancelled",
    "slot kReady -> kEmpty, evicted for another",
    "slot kReady -> kEmpty, evict_all",
    "refusal kResident",
    "refusal kLoading",
    "refusal kLeased",
    "refusal kDeclined",
    "refusal kLeased of a pinned load",
    "pinned load",
    "lease taken",
    "lease ended",
    "victim by decayed-lfu",
    "victim by edge",
    "victim by edge:printed",
    "victim by fifo",
    "victim by lfru",
    "victim by lfu",
    "victim by lru",
    "victim by static",
    "hint admitted over a victim",
    "ticket shared by a demand",
    "ticket shared by a hint",
    "ticket shared while the end is reported",
    "load begun anew while the end is reported",
    "hint raised to a demand",
    "revived by submit",
    "revived by promote",
    "cancel of a queued hint",
    "cancel of a hint in flight",
    "cancel refused: a demand",
    "cancel refused: nothing in flight",
    "cancel of a demand when told so",
    "cancel_all with chunks in flight",
    "hint dropped at its deadline",
    "demand overtakes a hint",
    "raised hint overtakes a hint",
    "hints held to half of the link",
    "chunk failed while others were in flight",
    "failure of a cancelled load",
    "failure with its ticket shared",
    "chunk refused by the link",
};

struct Chunks final : ChunkSource {
  [[nodiscard]] std::int32_t num_chunks(ExpertKey key) const override {
    return 1 + (to_int(key.layer) + to_int(key.expert)) % kMaxChunks;
  }
  [[nodiscard]] std::size_t chunk_bytes(ExpertKey, std::int32_t) const override {
    return sizeof(std::int64_t);
  }
};

class Walk {
 public:
  Walk(const std::string& policy, std::uint64_t seed, Coverage& coverage)
      : policy_name_(policy),
        coverage_(coverage),
        random_(seed),
        cache_(kSlots, make_policy(policy, {.num_layers = kLayers, .max_experts = kExperts})),
        policy_(policy, kLayers),
        link_(kDepth, [this](const ChunkCopy& copy) { fill(copy); }),
        transfers_(
            chunks_, link_,
            [this](const LoadRequest& request, TicketState state, std::exception_ptr error,
                   std::uint64_t bytes_read) { on_finished(request, state, error, bytes_read); }) {
    link_.set_landed([this](std::uint64_t token, std::exception_ptr error, std::uint64_t bytes) {
      transfers_.landed(token, std::move(error), bytes);
    });
    link_.set_on_start([this](const ChunkCopy& copy) { on_start(copy); });
  }

  void run(int steps) {
    for (int i = 0; i < steps && !::testing::Test::HasFailure(); ++i) {
      now_ += pick(3);
      act();
      compare();
    }
    closing_ = true;
    leases_.clear();
    model_leases_.clear();
    for (ModelRequest& request : requests_) request.cancelling = true;
    transfers_.cancel_all();
    while (!link_.waiting().empty() && !::testing::Test::HasFailure()) land(0, false);
    EXPECT_TRUE(transfers_.idle());
    EXPECT_TRUE(requests_.empty()) << "a ticket was forgotten";
    EXPECT_EQ(cache_.num_leases(), 0);
  }

 private:
  struct ModelSlot {
    SlotState state = SlotState::kEmpty;
    ExpertKey key{};
  };

  std::int32_t pick(std::int32_t below) {
    return static_cast<std::int32_t>(random_() % static_cast<std::uint64_t>(below));
  }
  bool chance(std::int32_t one_in) { return pick(one_in) == 0; }
  ExpertKey any_key() { return make_key(pick(kLayers), pick(kExperts)); }
  ExpertKey likely_key() {
    if (requests_.empty() || chance(3)) return any_key();
    return requests_[static_cast<std::size_t>(pick(static_cast<std::int32_t>(requests_.size())))]
        .key;
  }
  static std::size_t index(SlotIdx slot) { return static_cast<std::size_t>(to_int(slot)); }
  static std::int64_t content(ExpertKey key, std::int32_t chunk) {
    return to_int(key.layer) * 10'000 + to_int(key.expert) * 100 + chunk + 1;
  }
  std::byte* slot_data(std::size_t slot) {
    return reinterpret_cast<std::byte*>(slab_[slot].data());
  }

  // I1: a chunk lands in a slot that is loading, for the expert that the slot was given to.
  void fill(const ChunkCopy& copy) {
    const std::optional<std::size_t> found = slot_of(copy.key);
    ASSERT_TRUE(found.has_value()) << "a chunk landed for an expert without a slot";
    ASSERT_EQ(slot_data(*found), copy.slot);
    ASSERT_EQ(slots_[*found].state, SlotState::kLoading);
    const std::int64_t value = content(copy.key, copy.chunk);
    std::memcpy(copy.slot + sizeof(value) * static_cast<std::size_t>(copy.chunk), &value,
                sizeof(value));
  }

  void act() {
    switch (pick(16)) {
      case 0:
      case 1:
        return event();
      case 2:
      case 3:
        return ask(any_key(), SlotCache::Purpose::kHint);
      case 4:
        return ask(any_key(), SlotCache::Purpose::kDemand, SlotIdx{pick(kSlots)});
      case 5:
        return cancel(likely_key(), chance(8));
      case 6:
        return promote(likely_key());
      case 7:
        return end_lease();
      case 8:
        if (chance(12)) return evict_all();
        if (chance(12)) return cancel_all();
        return end_lease();
      case 9:
      case 10:
      case 11:
        return step();
      default:
        if (const std::size_t waiting = link_.waiting().size(); waiting > 0)
          land(static_cast<std::size_t>(pick(static_cast<std::int32_t>(waiting))), chance(10));
    }
  }

  // One layer asks: tell the policy, lease residents, demand the rest.
  void event() {
    const LayerIdx layer{pick(kLayers)};
    step_ += layer == LayerIdx{0} ? 1 : 0;
    std::vector<ExpertIdx> experts;
    for (std::int32_t expert = 0; expert < kExperts; ++expert)
      if (chance(4)) experts.push_back(ExpertIdx{expert});
    cache_.touch({.step = step_, .layer = layer, .experts = experts});
    policy_.event(step_, layer, experts);
    std::vector<ExpertKey> missing;
    for (const ExpertIdx expert : experts)
      if (!lease({layer, expert})) missing.push_back({layer, expert});
    for (const ExpertKey key : missing) ask(key, SlotCache::Purpose::kDemand);
  }

  bool lease(ExpertKey key) {
    std::optional<SlotLease> taken = cache_.find(key);
    const std::optional<std::size_t> slot = slot_of(key);
    const bool ready = slot && slots_[*slot].state == SlotState::kReady;
    EXPECT_EQ(taken.has_value(), ready);
    if (!taken || !ready) return ready;
    EXPECT_EQ(index(taken->slot()), *slot);
    coverage_.hit("lease taken");
    leases_.emplace_back(*std::move(taken));
    model_leases_.push_back(*slot);
    return true;
  }

  void end_lease() {
    if (leases_.empty()) return;
    const auto which = static_cast<std::ptrdiff_t>(pick(static_cast<std::int32_t>(leases_.size())));
    leases_.erase(leases_.begin() + which);
    model_leases_.erase(model_leases_.begin() + which);
    coverage_.hit("lease ended");
  }

  [[nodiscard]] bool is_idle(std::size_t slot) const {
    return slots_[slot].state == SlotState::kReady &&
           std::find(model_leases_.begin(), model_leases_.end(), slot) == model_leases_.end();
  }

  // Asks for a slot and, if there is one, for the load. The model says beforehand what may happen.
  void ask(ExpertKey key, SlotCache::Purpose purpose, std::optional<SlotIdx> pinned = {}) {
    const bool demand = purpose == SlotCache::Purpose::kDemand;
    std::vector<std::size_t> empty;
    std::vector<std::size_t> idle;
    for (std::size_t slot = 0; slot < slots_.size(); ++slot) {
      if (pinned && index(*pinned) != slot) continue;
      if (slots_[slot].state == SlotState::kEmpty) empty.push_back(slot);
      if (is_idle(slot)) idle.push_back(slot);
    }
    const std::optional<std::size_t> present = slot_of(key);
    const auto begun = cache_.begin_load(key, purpose, pinned);
    if (const auto* const refusal = std::get_if<Refusal>(&begun)) {
      refused(key, demand, *refusal, present, empty, idle, pinned.has_value());
      return;
    }
    const std::size_t slot = index(std::get<SlotIdx>(begun));
    ASSERT_FALSE(present.has_value()) << "an expert got a second slot (I5)";
    if (!empty.empty()) {
      ASSERT_EQ(slot, empty.front()) << "an empty slot goes first";
    } else {
      evicted(key, demand, slot, idle, pinned.has_value());
    }
    if (pinned) coverage_.hit("pinned load");
    coverage_.hit("slot kEmpty -> kLoading");
    policy_.load(key, !demand);
    slots_[slot] = {.state = SlotState::kLoading, .key = key};
    submit(key, slot, demand);
  }

  void refused(ExpertKey key, bool demand, Refusal refusal, std::optional<std::size_t> present,
               const std::vector<std::size_t>& empty, const std::vector<std::size_t>& idle,
               bool pinned) {
    switch (refusal) {
      case Refusal::kResident:
        ASSERT_TRUE(present.has_value());
        ASSERT_EQ(slots_[*present].state, SlotState::kReady);
        coverage_.hit("refusal kResident");
        return;
      case Refusal::kLoading:
        ASSERT_TRUE(present.has_value());
        ASSERT_EQ(slots_[*present].state, SlotState::kLoading);
        coverage_.hit("refusal kLoading");
        submit(key, std::nullopt, demand);
        return;
      case Refusal::kLeased:
        ASSERT_FALSE(present.has_value());
        ASSERT_TRUE(empty.empty() && idle.empty()) << "refused, but a slot was free";
        coverage_.hit(pinned ? "refusal kLeased of a pinned load" : "refusal kLeased");
        return;
      case Refusal::kDeferred:
        ADD_FAILURE() << policy_name_ << " lets hints wait";
        return;
      case Refusal::kDeclined:
        ASSERT_FALSE(demand) << "a demand was declined (law 4)";
        ASSERT_TRUE(!present && empty.empty());
        std::size_t victim = idle.front();
        for (const std::size_t slot : idle)
          if (score(slot) < score(victim)) victim = slot;
        ASSERT_NE(policy_.admits_hint(key, slots_[victim].key), true);
        coverage_.hit("refusal kDeclined");
    }
  }

  double score(std::size_t slot) { return policy_.worth(slots_[slot].key); }

  void evicted(ExpertKey key, bool demand, std::size_t slot, const std::vector<std::size_t>& idle,
               bool pinned) {
    ASSERT_NE(std::find(idle.begin(), idle.end(), slot), idle.end())
        << "a leased or loading expert lost its slot (I7)";
    const ExpertKey victim = slots_[slot].key;
    for (const std::size_t other : idle) {
      ASSERT_LE(score(slot), score(other) + 1e-9)
          << policy_name_ << " evicted expert " << to_int(victim.expert) << " of layer "
          << to_int(victim.layer) << ", which it had to keep before that of slot " << other;
    }
    if (!demand) {
      ASSERT_NE(policy_.admits_hint(key, victim), false);
      coverage_.hit("hint admitted over a victim");
    }
    coverage_.hit("slot kReady -> kEmpty, evicted for another");
    if (!pinned) coverage_.hit("victim by " + policy_name_);
  }

  void submit(ExpertKey key, std::optional<std::size_t> slot, bool demand) {
    LoadRequest load{.key = key, .slot = slot ? slot_data(*slot) : nullptr};
    if (!demand) {
      load.priority = chance(2) ? Priority::kNextLayer : Priority::kFurtherAhead;
      load.probability = pick(10) / 10.0;
      load.deadline = chance(2) ? now_ + pick(60) : kNever;
    }
    const Ticket ticket = transfers_.submit(load);
    if (!slot) {
      ModelRequest* const shared = request_of(key);
      ASSERT_NE(shared, nullptr) << "a loading slot without a load";
      ASSERT_EQ(shared->ticket, ticket);
      if (reporting_ && *reporting_ == key) {
        coverage_.hit("ticket shared while the end is reported");
        return;
      }
      coverage_.hit(demand ? "ticket shared by a demand" : "ticket shared by a hint");
      if (shared->cancelling) coverage_.hit("revived by submit");
      if (demand && shared->is_hint()) coverage_.hit("hint raised to a demand");
      shared->raise(load.priority, load.probability, load.deadline);
      ++shares_[key];
      return;
    }
    requests_.push_back({.key = key,
                         .ticket = ticket,
                         .priority = load.priority,
                         .probability = demand ? 1.0 : load.probability,
                         .deadline = load.deadline,
                         .arrival = ++arrivals_,
                         .num_chunks = chunks_.num_chunks(key),
                         .was_hint = !demand});
    shares_[key] = 0;
  }

  void promote(ExpertKey key) {
    const Priority to = chance(2) ? Priority::kDemand : Priority::kNextLayer;
    transfers_.promote(key, to);
    if (ModelRequest* const request = request_of(key)) {
      if (request->cancelling) coverage_.hit("revived by promote");
      if (to == Priority::kDemand && request->is_hint()) coverage_.hit("hint raised to a demand");
      request->raise(to, request->probability, request->deadline);
    }
  }

  void cancel(ExpertKey key, bool even_demand) {
    ModelRequest* const request = request_of(key);
    const bool expected = request != nullptr && (even_demand || request->is_hint());
    if (request == nullptr) coverage_.hit("cancel refused: nothing in flight");
    if (request != nullptr && !expected) coverage_.hit("cancel refused: a demand");
    if (expected) {
      request->cancelling = true;
      coverage_.hit(!request->is_hint()      ? "cancel of a demand when told so"
                    : request->in_flight > 0 ? "cancel of a hint in flight"
                                             : "cancel of a queued hint");
    }
    EXPECT_EQ(transfers_.cancel(key, even_demand), expected);
  }

  void cancel_all() {
    for (ModelRequest& request : requests_) request.cancelling = true;
    if (!link_.waiting().empty()) coverage_.hit("cancel_all with chunks in flight");
    // What the callback begins anew is cancelled by the same call: the model says so afterwards.
    anew_is_cancelled_ = true;
    transfers_.cancel_all();
    anew_is_cancelled_ = false;
  }

  void evict_all() {
    std::int32_t expected = 0;
    for (std::size_t slot = 0; slot < slots_.size(); ++slot) {
      if (!is_idle(slot)) continue;
      slots_[slot] = {};
      ++expected;
    }
    EXPECT_EQ(cache_.evict_all(), expected);
    coverage_.hit("slot kReady -> kEmpty, evict_all", expected);
  }

  void step() {
    for (ModelRequest& request : requests_) {
      if (!request.expires(now_)) continue;
      request.cancelling = true;
      coverage_.hit("hint dropped at its deadline");
    }
    refuses_ = chance(30);
    (void)transfers_.step(now_);
    refuses_ = false;
    const ModelRequest* const next = startable();
    if (next == nullptr || link_.waiting().size() == kDepth) return;
    ASSERT_TRUE(next->is_hint() && hints_in_flight() >= kHintDepth)
        << "the link has room, and a request was left waiting";
    coverage_.hit("hints held to half of the link");
  }

  // The link was given a chunk: it has to be the best request's next one.
  void on_start(const ChunkCopy& copy) {
    ModelRequest* const best = startable();
    ASSERT_NE(best, nullptr) << "a chunk was started that nobody may start";
    ASSERT_EQ(best->key, copy.key) << "not the best request was served first";
    ASSERT_EQ(best->started, copy.chunk) << "chunks start in order";
    ASSERT_EQ(best->priority, copy.priority);
    if (best->is_hint()) {
      ASSERT_LT(hints_in_flight(), kHintDepth) << "hints took more than half of the link (law 4)";
    } else {
      for (const ModelRequest& other : requests_) {
        if (!other.is_hint() || !other.may_start() || other.arrival > best->arrival) continue;
        coverage_.hit(best->was_hint ? "raised hint overtakes a hint" : "demand overtakes a hint");
      }
    }
    ++best->started;
    if (std::exchange(refuses_, false)) {
      coverage_.hit("chunk refused by the link");
      best->failed = true;
      throw std::runtime_error("planned refusal");
    }
    ++best->in_flight;
  }

  ModelRequest* startable() {
    ModelRequest* best = nullptr;
    for (ModelRequest& request : requests_)
      if (request.may_start() && (best == nullptr || request.rank() < best->rank()))
        best = &request;
    return best;
  }
  std::int32_t hints_in_flight() const {
    std::int32_t count = 0;
    for (const ModelRequest& request : requests_)
      if (request.is_hint()) count += request.in_flight;
    return count;
  }

  void land(std::size_t position, bool fails) {
    const ExpertKey key = link_.waiting()[position].key;
    ModelRequest* const request = request_of(key);
    ASSERT_NE(request, nullptr);
    --request->in_flight;
    if (fails) {
      if (request->in_flight > 0) coverage_.hit("chunk failed while others were in flight");
      if (request->cancelling && !request->failed) coverage_.hit("failure of a cancelled load");
      if (shares_[key] > 0) coverage_.hit("failure with its ticket shared");
      request->failed = true;
      link_.fail(position, "planned failure");
    } else {
      link_.land(position);
    }
  }

  // The engine's callback: moves the slot, and is sometimes met by a late asker.
  void on_finished(const LoadRequest& load, TicketState state, const std::exception_ptr& error,
                   std::uint64_t bytes_read) {
    ModelRequest* const request = request_of(load.key);
    ASSERT_NE(request, nullptr) << "an end was reported that nothing led to";
    ASSERT_EQ(request->outcome(), state);
    ASSERT_EQ(error != nullptr, state == TicketState::kFailed);
    ASSERT_FALSE(request->ticket.finished()) << "the ticket resolved before the slot moved";
    if (state == TicketState::kDone) {
      ASSERT_EQ(bytes_read, sizeof(std::int64_t) * static_cast<std::size_t>(request->num_chunks));
    }
    ended_.emplace_back(request->ticket, state);
    reporting_ = load.key;
    if (chance(8)) {
      EXPECT_EQ(transfers_.find(load.key), request->ticket);
      submit(load.key, std::nullopt, true);
    }
    reporting_.reset();
    requests_.erase(requests_.begin() + (request - requests_.data()));
    const std::size_t slot = slot_of(load.key).value();
    if (state == TicketState::kDone) {
      cache_.finish_load(load.key);
      slots_[slot].state = SlotState::kReady;
      coverage_.hit("slot kLoading -> kReady");
      return;
    }
    cache_.fail_load(load.key);
    slots_[slot] = {};
    coverage_.hit(state == TicketState::kFailed ? "slot kLoading -> kEmpty, failed"
                                                : "slot kLoading -> kEmpty, cancelled");
    if (!closing_ && chance(8)) {
      coverage_.hit("load begun anew while the end is reported");
      ask(load.key, SlotCache::Purpose::kDemand);
      ModelRequest* const anew = request_of(load.key);
      if (anew_is_cancelled_ && anew != nullptr) anew->cancelling = true;
    }
  }

  ModelRequest* request_of(ExpertKey key) {
    for (ModelRequest& request : requests_)
      if (request.key == key) return &request;
    return nullptr;
  }
  std::optional<std::size_t> slot_of(ExpertKey key) const {
    for (std::size_t slot = 0; slot < slots_.size(); ++slot)
      if (slots_[slot].state != SlotState::kEmpty && slots_[slot].key == key) return slot;
    return std::nullopt;
  }

  void compare() {
    const auto views = cache_.snapshot();
    for (std::size_t i = 0; i < slots_.size(); ++i) {
      const ModelSlot& model = slots_[i];
      const SlotCache::SlotView& view = views[i];
      ASSERT_EQ(view.state, model.state) << "slot " << i;
      ASSERT_EQ(view.leases, std::count(model_leases_.begin(), model_leases_.end(), i));
      if (model.state == SlotState::kEmpty) continue;
      ASSERT_EQ(view.key, model.key);
      ASSERT_EQ(cache_.state(model.key), model.state);
      ASSERT_EQ(transfers_.find(model.key).has_value(), model.state == SlotState::kLoading);
      if (model.state != SlotState::kReady) continue;
      for (std::int32_t chunk = 0; chunk < chunks_.num_chunks(model.key); ++chunk)
        ASSERT_EQ(slab_[i][static_cast<std::size_t>(chunk)], content(model.key, chunk))
            << "a ready slot holds another expert's bytes";
    }
    for (const ModelRequest& request : requests_) ASSERT_FALSE(request.ticket.finished());
    for (const auto& [ticket, state] : ended_) {
      ASSERT_EQ(ticket.state(), state);
      if (state == TicketState::kFailed) {
        ASSERT_THROW(ticket.rethrow(), std::runtime_error);
      }
    }
    ended_.clear();
    const TransferEngine::Depth depth = transfers_.depth();
    ASSERT_EQ(depth.queued, std::count_if(requests_.begin(), requests_.end(),
                                          [](const auto& each) { return each.may_start(); }));
    ASSERT_EQ(depth.in_flight, static_cast<std::int32_t>(link_.waiting().size()));
    ASSERT_EQ(depth.hints_in_flight, hints_in_flight());
    ASSERT_EQ(transfers_.idle(), requests_.empty());
  }

  const std::string policy_name_;
  Coverage& coverage_;
  std::mt19937_64 random_;
  Nanos now_ = 0;
  std::int64_t step_ = 0;
  Chunks chunks_;
  std::array<std::array<std::int64_t, kMaxChunks>, kSlots> slab_{};

  SlotCache cache_;
  PolicyModel policy_;
  SteppedLink link_;
  TransferEngine transfers_;
  std::vector<SlotLease> leases_;

  std::vector<ModelSlot> slots_ = std::vector<ModelSlot>(kSlots);
  std::vector<std::size_t> model_leases_;
  std::vector<ModelRequest> requests_;
  std::map<ExpertKey, int> shares_;
  std::vector<std::pair<Ticket, TicketState>> ended_;
  std::optional<ExpertKey> reporting_;
  std::int64_t arrivals_ = 0;
  bool anew_is_cancelled_ = false;
  bool refuses_ = false;
  bool closing_ = false;
};

TEST(TransferWalk, CacheAndTransfersAgreeWithAPlainModelOverARandomWalk) {
  const std::uint64_t seed = testing::test_seed();
  Coverage coverage(kRows);
  for (const std::string policy : PolicyModel::kNames) {
    SCOPED_TRACE(policy + ", seed " + std::to_string(seed));
    Walk walk(policy, seed, coverage);
    walk.run(kStepsPerPolicy);
    if (HasFailure()) break;
  }
  coverage.expect_each_at_least(
      100, std::to_string(kStepsPerPolicy * PolicyModel::kNames.size()) + " steps of the walk",
      seed);
}

}  // namespace
}  // namespace sluice
