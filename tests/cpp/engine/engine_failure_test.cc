// What goes wrong, and that the session works on: failed loads, interrupts, callbacks that throw,
// settings that cannot work, calls on a session that closes.
#include <gtest/gtest.h>

#include <atomic>
#include <stdexcept>
#include <thread>

#include "engine/plain.h"
#include "engine/rig.h"

namespace sluice::testing {
namespace {

Call call_for(const ModelShape& model, const std::vector<std::int64_t>& experts,
              std::int64_t num_tokens = 1) {
  std::mt19937_64 rng(11);
  Call call = make_call(
      model, 0, {.num_tokens = num_tokens, .top_k = static_cast<std::int64_t>(experts.size())},
      rng);
  for (std::size_t i = 0; i < call.ids.size(); ++i) call.ids[i] = experts[i % experts.size()];
  return call;
}

struct EngineFailure : ::testing::Test {
  ModelShape shape;
  Model model{shape, 3};
  Call call = call_for(shape, {0, 1, 2});
  std::vector<std::byte> expected = PlainForward(model)(call);

  void expect_works_on(Rig& rig) {
    rig.on_drive = nullptr;
    EXPECT_EQ(rig.num_leases(), 0);
    EXPECT_EQ(rig.forward(call), expected);
    rig.land_all();
    EXPECT_EQ(rig.num_leases(), 0);
    rig.expect_slots_hold_their_experts();
  }
};

TEST_F(EngineFailure, AFailedLoadEndsTheForwardWithItsOwnErrorAndTheSessionWorksOn) {
  for (const std::int64_t slots : {1, 2, 4}) {
    Rig rig(model, {.device_memory = model.slots(slots), .depth = 2});
    rig.on_drive = [&] { (void)rig.link().fail(0, "the disk is gone"); };
    try {
      (void)rig.forward(call);
      FAIL() << "expected the load's error";
    } catch (const std::runtime_error& error) {
      EXPECT_STREQ(error.what(), "the disk is gone");
    }
    const EngineStats stats = rig.engine().stats();
    EXPECT_EQ(stats.requests, 3);
    EXPECT_EQ(stats.requests, stats.hits + stats.late + stats.misses);
    expect_works_on(rig);
  }
}

TEST_F(EngineFailure, AFailedGuessIsOnlyAnErrorForWhoeverJoinedIt) {
  Rig rig(model, {.device_memory = model.slots(4), .depth = 2});
  const Hint hint{.key = make_key(0, 0)};
  rig.engine().hint({&hint, 1});
  ASSERT_TRUE(rig.link().fail(0, "nobody waits"));
  EXPECT_EQ(rig.engine().stats().hints_dropped, 1);
  rig.engine().hint({&hint, 1});
  rig.on_drive = [&] { (void)rig.link().fail(make_key(0, 0), "the forward waits"); };
  EXPECT_THROW((void)rig.forward(call), std::runtime_error);
  EXPECT_EQ(rig.engine().stats().late, 1);
  expect_works_on(rig);
}

TEST_F(EngineFailure, ALinkThatRefusesAChunkFailsThatLoadAlone) {
  Rig rig(model, {.device_memory = model.slots(4)});
  rig.link().refuse_next();
  EXPECT_THROW((void)rig.forward(call), std::runtime_error);
  expect_works_on(rig);
}

TEST_F(EngineFailure, AnInterruptEndsAStallAndTheSameCallSucceedsLater) {
  Rig rig(model, {.device_memory = model.slots(2), .depth = 1});
  int asked = 0;
  rig.interrupt = [&] { return ++asked == 3; };
  EXPECT_THROW((void)rig.forward(call), Interrupted);
  EXPECT_EQ(asked, 3);
  expect_works_on(rig);
}

TEST_F(EngineFailure, WhatACallbackThrowsLeavesTheForwardUnchanged) {
  ModelShape generic = shape;
  generic.generic_gate = true;
  const Model other(generic, 3);
  enum class Trouble { kNone, kThrow, kCode, kReenter, kClose } trouble = Trouble::kNone;
  std::vector<LayerSpec> specs = other.specs();
  Engine* engine = nullptr;
  for (LayerSpec& spec : specs) {
    spec.gate_callback = [&](LayerIdx layer, DType dtype, std::int64_t rows,
                             std::int64_t in_columns, std::int64_t out_columns, const void* in,
                             void* out) {
      EXPECT_GE(engine->stats().forwards, 0) << "statistics need no turn";
      if (trouble == Trouble::kThrow) throw std::logic_error("the gate's own");
      if (trouble == Trouble::kCode) return 7;
      if (trouble == Trouble::kReenter) engine->forward(call.args(nullptr));
      if (trouble == Trouble::kClose) engine->close();
      return multiply_gate(layer, dtype, rows, in_columns, out_columns, in, out);
    };
  }
  Engine::Parts parts;
  parts.store = other.store();
  Engine session({.device_memory = other.slots(2)}, std::move(parts), specs);
  engine = &session;
  std::vector<std::byte> out(call.hidden.size());
  const ForwardArgs args = call.args(out.data());
  trouble = Trouble::kThrow;
  EXPECT_THROW(session.forward(args), std::logic_error);
  trouble = Trouble::kCode;
  EXPECT_THROW(session.forward(args), InternalError);
  trouble = Trouble::kReenter;
  EXPECT_THROW(session.forward(args), Error);
  trouble = Trouble::kClose;
  EXPECT_THROW(session.forward(args), Error);
  trouble = Trouble::kNone;
  session.forward(args);
  EXPECT_EQ(out, PlainForward(other)(call));
  EXPECT_GE(session.stats().generic_gate_calls, 3);
  for (const auto& pool : session.residency())
    for (const SlotCache::SlotView& view : pool) EXPECT_EQ(view.leases, 0);
}

TEST_F(EngineFailure, AfterADeviceErrorEveryLaterForwardRaisesTheFirstCause) {
  ModelShape generic = shape;
  generic.generic_gate = true;
  const Model other(generic, 3);
  int calls = 0;
  std::vector<LayerSpec> specs = other.specs();
  specs[0].gate_callback = [&](auto&&...) -> int {
    throw DeviceError("cause " + std::to_string(++calls));
  };
  Engine::Parts parts;
  parts.store = other.store();
  Engine session({.device_memory = other.slots(2)}, std::move(parts), specs);
  std::vector<std::byte> out(call.hidden.size());
  for (int i = 0; i < 3; ++i) {
    try {
      session.forward(call.args(out.data()));
      FAIL() << "expected the first cause";
    } catch (const DeviceError& error) {
      EXPECT_STREQ(error.what(), "cause 1");
    }
  }
}

TEST_F(EngineFailure, SettingsThatCannotWorkAreNamed) {
  const auto make = [&](EngineOptions options, std::vector<LayerSpec> specs) {
    Engine::Parts parts;
    parts.store = model.store();
    Engine engine(std::move(options), std::move(parts), std::move(specs));
  };
  EXPECT_THROW(make({.device_memory = model.slots(1) - 1}, model.specs()), CapacityError);
  EXPECT_THROW(make({.device_memory = model.slots(1), .policy = "random"}, model.specs()),
               ConfigError);
  EXPECT_THROW(make({.device_memory = model.slots(1), .io_threads = 0}, model.specs()),
               ConfigError);
  EXPECT_THROW(make({.device_memory = model.slots(1)}, {}), ConfigError);
  std::vector<LayerSpec> no_callback = model.specs();
  no_callback[1].gate.kind = GateKind::kGeneric;
  EXPECT_THROW(make({.device_memory = model.slots(1)}, no_callback), ConfigError);
  std::vector<LayerSpec> ungated = model.specs();
  ungated[0].gate.kind = GateKind::kRelu2;
  EXPECT_THROW(make({.device_memory = model.slots(1)}, ungated), ConfigError);
}

TEST_F(EngineFailure, ActivationsNarrowerThanWeightsAndUnknownLayersAreRefused) {
  Rig rig(model, {.device_memory = model.slots(2)});
  Call narrow_call = call;
  narrow_call.activations = DType::kBF16;
  EXPECT_THROW((void)rig.forward(narrow_call), ConfigError);
  Call unknown = call;
  unknown.layer = LayerIdx{2};
  EXPECT_THROW((void)rig.forward(unknown), ConfigError);
  EXPECT_EQ(rig.engine().stats().requests, 0);
  expect_works_on(rig);
}

TEST_F(EngineFailure, AClosedSessionRefusesForwardsAndDropsGuesses) {
  Rig rig(model, {.device_memory = model.slots(4), .depth = 2});
  const Hint hint{.key = make_key(1, 0)};
  rig.engine().hint({&hint, 1});
  ASSERT_EQ(rig.link().waiting().size(), 1u) << "close finds a chunk in flight";
  rig.engine().close();
  rig.engine().close();
  EXPECT_TRUE(rig.link().waiting().empty());
  EXPECT_THROW((void)rig.forward(call), Error);
  rig.engine().hint({&hint, 1});
  rig.engine().drain();
  const EngineStats stats = rig.engine().stats();
  EXPECT_EQ(stats.hints_dropped, 2);
  EXPECT_EQ(stats.resident_bytes, 0u);
  EXPECT_EQ(stats.slab_bytes, 0u);
  std::vector<std::byte> expert(model.layout().bytes());
  rig.engine().store().read_expert(make_key(1, 5), expert);
  EXPECT_TRUE(model.holds(make_key(1, 5), expert.data()));
}

TEST_F(EngineFailure, CloseWaitsForARunningForward) {
  Rig rig(model, {.device_memory = model.slots(2), .depth = 1});
  std::atomic<bool> closing{false};
  std::atomic<bool> closed{false};
  std::thread closer;
  rig.on_drive = [&] {
    if (!closer.joinable()) {
      closer = std::thread([&] {
        closing = true;
        rig.engine().close();
        closed = true;
      });
      while (!closing) std::this_thread::yield();
    }
    EXPECT_FALSE(closed);
    rig.land_one();
  };
  EXPECT_EQ(rig.forward(call), expected);
  closer.join();
  EXPECT_THROW((void)rig.forward(call), Error);
}

}  // namespace
}  // namespace sluice::testing
