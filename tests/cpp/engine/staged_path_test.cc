// The two hops to a device, single-stepped: a random walk in which reads, copies, retirements,
// failures, cancels and the device itself move in any order, against a plain record of what was
// asked for.
#include "engine/staged_path.h"

#include <gtest/gtest.h>

#include <map>
#include <random>
#include <set>

#include "base/log_ring.h"
#include "engine/model.h"
#include "support/coverage.h"
#include "support/seed.h"
#include "support/stepped_device.h"
#include "support/stepped_link.h"

namespace sluice::testing {
namespace {

/// A copy engine on which nothing moves until the test says so: chunks land in order, by being
/// enqueued on the device's copy stream, and retire when the test says that they are copied.
class SteppedCopyLink final : public CopyLink {
 public:
  SteppedCopyLink(Device& device, std::size_t chunk_bytes)
      : device_(device), chunk_bytes_(chunk_bytes) {}
  [[nodiscard]] int depth() const override { return 2; }
  [[nodiscard]] bool lands_early() const override { return true; }
  void set_landed(Landed landed) override { landed_ = std::move(landed); }
  void set_retired(Retired retired) override { retired_ = std::move(retired); }
  void start(const ChunkCopy& copy) override {
    waiting.push_back(copy);
    EXPECT_LE(waiting.size() + copying.size(), 2u);
  }
  void close() override {}
  [[nodiscard]] CopyCounters counters() const override { return {}; }

  bool land() {
    if (waiting.empty()) return false;
    const ChunkCopy copy = waiting.front();
    waiting.erase(waiting.begin());
    const std::size_t offset = static_cast<std::size_t>(copy.chunk) * chunk_bytes_;
    device_.wait(device_.copy_stream(), copy.last_use);
    device_.copy_async(copy.slot + offset, copy.source + offset, copy.bytes, device_.copy_stream());
    copying.push_back(copy.token);
    landed_(copy.token, nullptr, copy.bytes);
    return true;
  }
  bool fail() {
    if (waiting.empty()) return false;
    const ChunkCopy copy = waiting.front();
    waiting.erase(waiting.begin());
    landed_(copy.token, std::make_exception_ptr(std::runtime_error("planted copy failure")), 0);
    return true;
  }
  bool retire() {
    if (copying.empty()) return false;
    const std::uint64_t token = copying.front();
    copying.erase(copying.begin());
    retired_(token);
    return true;
  }

  std::vector<ChunkCopy> waiting;
  std::vector<std::uint64_t> copying;

 private:
  Device& device_;
  const std::size_t chunk_bytes_;
  Landed landed_;
  Retired retired_;
};

constexpr std::size_t kCopyChunk = 2048;
constexpr std::int32_t kDeviceSlots = 5;

class Walker {
 public:
  Walker(const Model& model, std::int32_t host_slots, bool fills, std::uint64_t seed,
         Coverage& coverage)
      : model_(model), coverage_(coverage), rng_(seed) {
    const std::vector<LayerBytes> layers(
        2, {.slot_bytes = model.store()->slot_bytes(LayerIdx{0}), .num_experts = 8});
    auto read_link =
        std::make_unique<SteppedLink>(3, [this](const ChunkCopy& copy) { read(copy); }, &device_);
    auto copy_link = std::make_unique<SteppedCopyLink>(device_, kCopyChunk);
    reads_ = read_link.get();
    copies_ = copy_link.get();
    auto host = std::make_unique<HostTier>(
        plan_memory(model.slots(host_slots), layers, "host_memory"), *model.store(), "lru", device_,
        HostTier::Options{.fills = fills});
    host_ = host.get();
    path_ = make_staged_path({.store = model.store(),
                              .device = device_,
                              .clock = clock_,
                              .host = std::move(host),
                              .store_link = std::move(read_link),
                              .copy_chunk_bytes = kCopyChunk,
                              .copy_link = std::move(copy_link)});
    path_->connect([this](const LoadRequest& request, TicketState state, std::exception_ptr error,
                          std::uint64_t) { ended(request, state, error); },
                   [](std::exception_ptr error) {
                     try {
                       std::rethrow_exception(error);
                     } catch (const std::exception& what) {
                       ADD_FAILURE() << "broken: " << what.what();
                     }
                   });
    path_->reserve(kDeviceSlots);
    for (int i = 0; i < kDeviceSlots; ++i) {
      slots_.push_back({.memory = device_.allocate_slab(model.slots(1))});
    }
  }
  ~Walker() {
    path_->close();
    for (Slot& slot : slots_) device_.release(slot.ready);
  }

  void walk(int steps) {
    for (int i = 0; i < steps && !::testing::Test::HasFailure(); ++i) move();
    // Everything that was asked for ends, however it was interrupted.
    for (int i = 0; i < 100'000 && num_loading() > 0; ++i) {
      (void)path_->step();
      if (!reads_->land(rng_() % 3)) (void)reads_->land();
      (void)copies_->land();
      (void)device_.run();
      (void)copies_->retire();
    }
    EXPECT_EQ(num_loading(), 0) << "a load never ended";
    (void)device_.run();
    check_slots();
  }

 private:
  struct Slot {
    DeviceBuffer memory;
    ExpertKey key{};
    enum class State { kEmpty, kLoading, kReady } state = State::kEmpty;
    Priority priority = Priority::kDemand;
    bool told_to_stop = false;
    EventHandle ready{};
  };

  [[nodiscard]] int num_loading() const {
    return static_cast<int>(std::count_if(slots_.begin(), slots_.end(), [](const Slot& slot) {
      return slot.state == Slot::State::kLoading;
    }));
  }
  [[nodiscard]] Slot* loading() {
    std::vector<Slot*> all;
    for (Slot& slot : slots_) {
      if (slot.state == Slot::State::kLoading) all.push_back(&slot);
    }
    return all.empty() ? nullptr : all[rng_() % all.size()];
  }

  void move() {
    switch (rng_() % 20) {
      case 0:
      case 1:
        return submit();
      case 2:
        if (Slot* const slot = loading()) {
          path_->promote(slot->key, Priority::kDemand);
          slot->priority = Priority::kDemand;
          slot->told_to_stop = false;
        }
        return;
      case 3:
        if (rng_() % 3 == 0) cancel();
        return;
      case 4:
      case 5:
        (void)path_->step();
        return;
      case 6:
      case 7:
        if (!reads_->land(rng_() % 3)) (void)reads_->land();
        return;
      case 8:
        if (rng_() % 8 == 0 && reads_->fail(0, "planted read failure"))
          coverage_.hit("read failed");
        return;
      case 9:
        if (rng_() % 16 == 0 && copies_->fail()) {
          coverage_.hit("copy failed");
        } else {
          (void)copies_->land();
        }
        return;
      case 10:
        (void)device_.step(device_.copy_stream());
        return;
      case 11:
      case 12:
      case 13:
        (void)copies_->land();
        return;
      case 14:
      case 15:
        (void)device_.step(device_.copy_stream());
        return;
      default:
        if (device_.num_queued(device_.copy_stream()) == 0) (void)copies_->retire();
        check_slots();
        return;
    }
  }

  void submit() {
    Slot* free = nullptr;
    for (Slot& slot : slots_) {
      if (slot.state == Slot::State::kEmpty) free = &slot;
    }
    if (free == nullptr) {  // evict one, as the cache does
      for (Slot& slot : slots_) {
        if (slot.state == Slot::State::kReady && rng_() % 3 == 0) free = &slot;
      }
      if (free == nullptr) return;
    }
    const ExpertKey key =
        make_key(static_cast<std::int32_t>(rng_() % 2), static_cast<std::int32_t>(rng_() % 8));
    if (path_->in_flight(key)) {
      coverage_.hit("asked again while in flight");
      return;
    }
    const bool is_here = host_->find(key).has_value();
    coverage_.hit(is_here                  ? "in the host tier"
                  : host_->is_loading(key) ? "on its way to the host"
                                           : "on the disk");
    const auto priority = static_cast<Priority>(rng_() % 3);
    const Nanos deadline = is_hint(priority) && rng_() % 4 == 0 ? clock_.now() : kNever;
    device_.release(free->ready);
    // A kernel that still reads the slot, on the caller's stream: done when the device says so.
    const EventHandle last_use = device_.record(device_.copy_stream());
    *free = {.memory = std::move(free->memory),
             .key = key,
             .state = Slot::State::kLoading,
             .priority = priority};
    path_->submit({.key = key,
                   .slot = free->memory.data(),
                   .priority = priority,
                   .probability = 0.1 * static_cast<double>(1 + rng_() % 9),
                   .deadline = deadline,
                   .last_use = last_use});
    clock_.advance(1);
  }

  void cancel() {
    Slot* const slot = loading();
    if (slot == nullptr) return;
    const bool even_demand = rng_() % 4 == 0;
    const bool is_allowed = even_demand || is_hint(slot->priority);
    const ExpertKey key = slot->key;
    if (is_allowed) slot->told_to_stop = true;
    const bool was_cancelled = path_->cancel(key, even_demand);
    if (was_cancelled) coverage_.hit("cancelled");
    EXPECT_TRUE(is_allowed || !was_cancelled) << "a demand was cancelled";
  }

  void ended(const LoadRequest& request, TicketState state, const std::exception_ptr& error) {
    const auto slot = std::find_if(slots_.begin(), slots_.end(), [&](const Slot& each) {
      return each.state == Slot::State::kLoading && each.key == request.key;
    });
    ASSERT_NE(slot, slots_.end()) << "a load ended that nobody asked for, or twice";
    EXPECT_EQ(request.slot, slot->memory.data());
    EXPECT_EQ(error != nullptr, state == TicketState::kFailed);
    device_.release(request.last_use);
    if (state == TicketState::kCancelled) {
      EXPECT_TRUE(slot->told_to_stop || is_hint(request.priority)) << "law 4";
      if (!slot->told_to_stop) coverage_.hit("expired");
    }
    coverage_.hit(state == TicketState::kDone     ? "done"
                  : state == TicketState::kFailed ? "failed"
                                                  : "ended as cancelled");
    slot->state = state == TicketState::kDone ? Slot::State::kReady : Slot::State::kEmpty;
    if (state == TicketState::kDone) slot->ready = device_.record(device_.copy_stream());
  }

  /// Behind its ready event a slot holds its expert, whoever was read into the host slots since.
  void check_slots() {
    for (const Slot& slot : slots_) {
      if (slot.state != Slot::State::kReady || !device_.passed(slot.ready)) continue;
      ASSERT_TRUE(model_.holds(slot.key, slot.memory.data())) << describe(slot.key);
      coverage_.hit("bytes compared");
    }
  }

  void read(const ChunkCopy& copy) {
    if (copy.priority == Priority::kFill) coverage_.hit("filled");
    model_.store()->read(copy.key, copy.chunk, copy.slot, scratch_);
  }

  const Model& model_;
  Coverage& coverage_;
  std::mt19937_64 rng_;
  VirtualClock clock_;
  IoScratch scratch_;
  SteppedDevice device_;
  SteppedLink* reads_ = nullptr;
  SteppedCopyLink* copies_ = nullptr;
  HostTier* host_ = nullptr;
  std::vector<Slot> slots_;
  std::unique_ptr<StagedPath> path_;
};

TEST(StagedPath, BringsEveryExpertItsBytesWhateverMovesFirst) {
  const Model model({.hidden = 48, .intermediate = 40}, test_seed());
  Coverage coverage({"in the host tier", "on its way to the host", "on the disk", "done", "failed",
                     "ended as cancelled", "cancelled", "expired", "read failed", "copy failed",
                     "filled", "asked again while in flight", "bytes compared"});
  std::uint64_t seed = test_seed();
  for (const std::int32_t host_slots : {1, 2, 3, 6, 16}) {
    for (const bool fills : {true, false}) {
      for (int round = 0; round < 9; ++round) {
        SCOPED_TRACE("seed " + std::to_string(seed) + ", " + std::to_string(host_slots) +
                     " host slots");
        Walker walker(model, host_slots, fills, seed++, coverage);
        walker.walk(10'000);
        ASSERT_FALSE(::testing::Test::HasFailure());
      }
    }
  }
  coverage.expect_each_at_least(100, "staged path", test_seed());
}

TEST(StagedPath, LeavesAnExpertThatCannotBeReadToItsDemands) {
  const Model model({}, 3);
  const ExpertKey damaged = make_key(0, 3);
  for (const bool all_fail : {false, true}) {
    SteppedDevice device;
    VirtualClock clock;
    IoScratch scratch;
    const std::vector<LayerBytes> layers(
        2, {.slot_bytes = model.store()->slot_bytes(LayerIdx{0}), .num_experts = 8});
    auto read_link = std::make_unique<SteppedLink>(2, [&](const ChunkCopy& copy) {
      model.store()->read(copy.key, copy.chunk, copy.slot, scratch);
    });
    auto copy_link = std::make_unique<SteppedCopyLink>(device, kCopyChunk);
    SteppedLink& reads = *read_link;
    SteppedCopyLink& copies = *copy_link;
    auto path = make_staged_path(
        {.store = model.store(),
         .device = device,
         .clock = clock,
         .host = std::make_unique<HostTier>(plan_memory(model.slots(16), layers, "host_memory"),
                                            *model.store(), "lru", device, HostTier::Options{}),
         .store_link = std::move(read_link),
         .copy_chunk_bytes = kCopyChunk,
         .copy_link = std::move(copy_link)});
    std::vector<TicketState> ended;
    std::string message;
    path->connect(
        [&](const LoadRequest&, TicketState state, const std::exception_ptr& error, std::uint64_t) {
          ended.push_back(state);
          if (!error) return;
          try {
            std::rethrow_exception(error);
          } catch (const std::exception& what) {
            message = what.what();
          }
        },
        [](const std::exception_ptr&) { ADD_FAILURE() << "the path broke"; });
    path->reserve(1);
    (void)log_ring().drain();

    const auto fails = [&](ExpertKey key) { return all_fail || key == damaged; };
    const auto run = [&] {
      for (int i = 0; i < 1000; ++i) {
        (void)path->step();
        if (const auto waiting = reads.waiting(); !waiting.empty()) {
          const ExpertKey key = waiting.front().key;
          (void)(fails(key) ? reads.fail(0, "planted checksum error") : reads.land());
        }
        (void)copies.land();
        (void)device.run();
        (void)copies.retire();
      }
    };
    const auto reads_of = [&](ExpertKey key) {
      const auto history = reads.history();
      return std::count_if(history.begin(), history.end(), [&](const ChunkCopy& copy) {
        return copy.key == key && copy.chunk == 0;
      });
    };
    run();
    for (std::int32_t i = 0; i < 16; ++i) EXPECT_EQ(reads_of(make_key(i / 8, i % 8)), 1);
    EXPECT_EQ(path->counters().fill_errors, all_fail ? 16 : 1);
    EXPECT_EQ(path->host_tier().filled_bytes, all_fail ? 0u : model.slots(15));
    EXPECT_EQ(path->host_tier().pinned_bytes, model.slots(16)) << "it settles without them";
    const std::vector<LogRecord> log = log_ring().drain();
    ASSERT_EQ(log.size(), 1u) << "the first error";
    EXPECT_EQ(log[0].level, LogLevel::kWarning);
    EXPECT_EQ(log[0].text, "host tier: filling goes on without " +
                               std::string(all_fail ? "layer 0 expert 0" : "layer 0 expert 3") +
                               ", which raises when it is asked for: planted checksum error");

    // A demand tries again, and tells; nobody else does.
    DeviceBuffer slot = device.allocate_slab(model.slots(1));
    path->submit({.key = damaged, .slot = slot.data()});
    run();
    EXPECT_EQ(ended, std::vector{TicketState::kFailed});
    EXPECT_EQ(message, "planted checksum error");
    EXPECT_EQ(reads_of(damaged), 2);
    EXPECT_EQ(path->counters().fill_errors, all_fail ? 16 : 1);
    path->close();
  }
}

TEST(HostTier, PinsAnArenaWhenItIsFull) {
  const Model model({}, 3);
  SteppedDevice device;
  const std::vector<LayerBytes> layers(
      2, {.slot_bytes = model.store()->slot_bytes(LayerIdx{0}), .num_experts = 8});
  HostTier host(plan_memory(model.slots(3), layers, "host_memory"), *model.store(), "lru", device,
                {});
  EXPECT_EQ(host.progress().capacity_bytes, model.slots(3));
  for (std::int32_t e = 0; e < 3; ++e) {
    EXPECT_EQ(host.progress().pinned_bytes, 0u);
    const auto begun = host.begin_fill();
    ASSERT_TRUE(begun);
    EXPECT_EQ(begun->first, make_key(0, e));
    host.finish_load(begun->first);
    EXPECT_EQ(host.find(begun->first)->kind, MemoryKind::kHost);
    host.pin_filled();
  }
  EXPECT_EQ(host.progress().pinned_bytes, model.slots(3));
  EXPECT_EQ(host.find(make_key(0, 0))->kind, MemoryKind::kPinned);
  EXPECT_FALSE(host.begin_fill()) << "nothing is evicted to fill";
  host.close();
  EXPECT_EQ(device.live_bytes(), 0u);
}

TEST(HostTier, UsesThePinnedCapToWithinASlot) {
  const Model model({}, 3);
  SteppedDevice device;
  const std::vector<LayerBytes> layers(
      2, {.slot_bytes = model.store()->slot_bytes(LayerIdx{0}), .num_experts = 8});
  for (std::int32_t pinned = 0; pinned <= 4; ++pinned) {
    HostTier host(plan_memory(model.slots(3), layers, "host_memory"), *model.store(), "lru", device,
                  {.pinned_cap_bytes = model.slots(pinned) + 63, .fills = false});
    EXPECT_EQ(host.progress().pinned_bytes, model.slots(std::min(3, pinned)));
    EXPECT_EQ(host.progress().pageable_bytes, model.slots(std::max(0, 3 - pinned)));
    EXPECT_EQ(host.progress().capacity_bytes, model.slots(3));
    std::set<const std::byte*> slots;
    for (std::int32_t e = 0; e < 3; ++e) {
      const auto begun = host.begin_load(make_key(0, e));
      EXPECT_TRUE(slots.insert(std::get<HostTier::Target>(begun).data).second);
      host.finish_load(make_key(0, e));
      const auto source = host.find(make_key(0, e));
      EXPECT_EQ(source->kind, e < pinned ? MemoryKind::kPinned : MemoryKind::kHost);
      EXPECT_EQ(source->data, std::get<HostTier::Target>(begun).data);
    }
  }
}

TEST(HostTier, SharesThePinnedCapAmongSizeClasses) {
  const Model model({}, 3);
  SteppedDevice device;
  const std::size_t bytes = model.store()->slot_bytes(LayerIdx{0});
  const std::vector<LayerBytes> layers{{.slot_bytes = bytes, .num_experts = 8},
                                       {.slot_bytes = 2 * bytes, .num_experts = 8}};
  for (const auto& [cap, pinned] : {std::pair(2 * bytes, bytes), std::pair(3 * bytes, 3 * bytes)}) {
    const HostTier host(plan_memory(3 * bytes, layers, "host_memory"), *model.store(), "lru",
                        device, {.pinned_cap_bytes = cap, .fills = false});
    EXPECT_EQ(host.progress().pinned_bytes, pinned);
    EXPECT_EQ(host.progress().pageable_bytes, 3 * bytes - pinned);
  }
}

TEST(HostTier, FillsAndPinsWithoutWhatCannotBeRead) {
  const Model model({}, 3);
  SteppedDevice device;
  const std::vector<LayerBytes> layers(
      2, {.slot_bytes = model.store()->slot_bytes(LayerIdx{0}), .num_experts = 8});
  for (const std::int32_t slots : {3, 16}) {
    HostTier host(plan_memory(model.slots(slots), layers, "host_memory"), *model.store(), "lru",
                  device, {});
    const ExpertKey damaged = make_key(0, 1);
    std::vector<ExpertKey> filled;
    for (int tries = 0; tries < 100; ++tries) {
      const auto begun = host.begin_fill();
      if (!begun) break;
      EXPECT_EQ(host.progress().pinned_bytes, 0u) << "before all of it is filled";
      if (begun->first == damaged) {
        host.fail_load(damaged, {});
      } else {
        host.finish_load(begun->first);
        filled.push_back(begun->first);
      }
      host.pin_filled();
    }
    EXPECT_EQ(std::count(filled.begin(), filled.end(), damaged), 0);
    EXPECT_EQ(filled.size(), slots == 3 ? 3u : 15u) << "others take its place";
    host.pin_filled();
    EXPECT_EQ(host.progress().pinned_bytes, host.progress().capacity_bytes);

    // A demand tries it; once it has been read it is an expert like all others.
    ASSERT_TRUE(std::holds_alternative<HostTier::Target>(host.begin_load(damaged)));
    host.cancel_load(damaged, {});
    EXPECT_EQ(host.begin_fill()->first, damaged);
    host.finish_load(damaged);
    EXPECT_TRUE(host.find(damaged));
  }
}

TEST(HostTier, GivesASlotThatAFailureEmptiedToWhomeverHadNone) {
  const Model model({}, 3);
  SteppedDevice device;
  const std::vector<LayerBytes> layers(
      2, {.slot_bytes = model.store()->slot_bytes(LayerIdx{0}), .num_experts = 8});
  HostTier host(plan_memory(model.slots(3), layers, "host_memory"), *model.store(), "lru", device,
                {});
  for (std::int32_t e = 0; e < 3; ++e) EXPECT_EQ(host.begin_fill()->first, make_key(0, e));
  EXPECT_FALSE(host.begin_fill()) << "all slots are taken";
  host.fail_load(make_key(0, 2), {});
  EXPECT_EQ(host.begin_fill()->first, make_key(0, 3));
}

TEST(HostTier, PinsWhatFillsWhileAnotherArenaIsBeingPinned) {
  const Model model({}, 3);
  const std::size_t bytes = model.store()->slot_bytes(LayerIdx{0});
  for (const bool fails : {false, true}) {
    SteppedDevice device;
    // A class, and so an arena, of its own for each layer.
    const std::vector<LayerBytes> layers{{.slot_bytes = bytes, .num_experts = 8},
                                         {.slot_bytes = 2 * bytes, .num_experts = 8}};
    HostTier host(plan_memory(3 * bytes, layers, "host_memory"), *model.store(), "lru", device, {});
    ASSERT_EQ(host.begin_fill()->first, make_key(0, 0));
    ASSERT_EQ(host.begin_fill()->first, make_key(1, 0));
    int pinned = 0;
    device.set_on_pin([&] {
      if (++pinned > 1) return;
      // What another thread does meanwhile.
      host.finish_load(make_key(0, 0));
      host.pin_filled();
      if (fails) throw DeviceError("planted pin failure");
    });
    host.finish_load(make_key(1, 0));
    if (fails) {
      EXPECT_THROW(host.pin_filled(), DeviceError);
    } else {
      host.pin_filled();
    }
    EXPECT_EQ(pinned, 2);
    EXPECT_EQ(host.progress().pinned_bytes, fails ? bytes : 3 * bytes);
    EXPECT_EQ(host.progress().pageable_bytes, fails ? 2 * bytes : 0);
  }
}

TEST(HostTier, ALeasedExpertIsNoVictim) {
  const Model model({}, 3);
  SteppedDevice device;
  const std::vector<LayerBytes> layers(
      2, {.slot_bytes = model.store()->slot_bytes(LayerIdx{0}), .num_experts = 8});
  HostTier host(plan_memory(model.slots(1), layers, "host_memory"), *model.store(), "lru", device,
                {.fills = false});
  ASSERT_TRUE(std::holds_alternative<HostTier::Target>(host.begin_load(make_key(0, 0))));
  EXPECT_EQ(std::get<Refusal>(host.begin_load(make_key(0, 1))), Refusal::kLeased);
  host.finish_load(make_key(0, 0));
  auto source = host.find(make_key(0, 0));
  EXPECT_EQ(std::get<Refusal>(host.begin_load(make_key(0, 1))), Refusal::kLeased);
  const EventHandle copied = device.record(device.copy_stream());
  host.give_back(make_key(0, 0), *source, copied);
  const auto target = std::get<HostTier::Target>(host.begin_load(make_key(0, 1)));
  EXPECT_EQ(target.last_use, copied) << "I2: the reader waits for the copy";
  host.fail_load(make_key(0, 1), target.last_use);
  EXPECT_EQ(std::get<HostTier::Target>(host.begin_load(make_key(0, 2))).last_use, copied);
}

}  // namespace
}  // namespace sluice::testing
