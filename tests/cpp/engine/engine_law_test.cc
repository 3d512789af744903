// Law 1: the bits of a forward do not depend on slots, policies, guesses, or the order of landings.
#include <gtest/gtest.h>

#include "engine/plain.h"
#include "engine/rig.h"
#include "engine/shapes.h"
#include "support/seed.h"

namespace sluice::testing {
namespace {

enum class Guesses { kNone, kRandom, kAlwaysWrong };

std::vector<ModelShape> shapes() {
  std::vector<ModelShape> all = varied_shapes();
  all.push_back(shape_of(DType::kBF16, GateKind::kGeluTanh, true, false));
  all.push_back(shape_of(DType::kF16, GateKind::kClampedSilu, true, true));
  // More rows than are widened at a time.
  all.push_back(shape_of(DType::kBF16, GateKind::kSilu, true, false));
  all.back().intermediate = 200;
  return all;
}

std::vector<Call> make_calls(const ModelShape& model, std::mt19937_64& rng) {
  std::vector<Call> calls;
  std::vector<DType> activations = {model.dtype};
  if (model.dtype != DType::kF32) activations.push_back(DType::kF32);
  for (const DType dtype : activations) {
    for (const std::int64_t tokens : {0, 1, 2, 33}) {
      for (const std::int64_t top_k : {1, 3}) {
        for (std::int32_t layer = 0; layer < model.num_layers; ++layer) {
          calls.push_back(make_call(model, layer,
                                    {.num_tokens = tokens,
                                     .top_k = top_k,
                                     .activations = dtype,
                                     .weights_dtype = layer == 0 ? DType::kF32 : dtype,
                                     .odd_entries = tokens > 1},
                                    rng));
        }
      }
    }
  }
  return calls;
}

void guess(Rig& rig, const ModelShape& model, const Call& next, Guesses guesses) {
  std::vector<Hint> hints;
  for (int i = 0; i < 4; ++i) {
    ExpertKey key = make_key(static_cast<std::int32_t>(rig.rng()() % 3),  // layer 2 is unknown
                             static_cast<std::int32_t>(rig.rng()() % 9));
    if (guesses == Guesses::kAlwaysWrong) {
      const auto wanted = [&](std::int64_t id) {
        return std::find(next.ids.begin(), next.ids.end(), id) != next.ids.end();
      };
      key.layer = next.layer;
      std::int32_t expert = to_int(key.expert);
      while (expert < model.num_experts && wanted(expert)) ++expert;
      key.expert = ExpertIdx{expert};
    }
    hints.push_back({.key = key, .probability = 0.1 * static_cast<double>(1 + rig.rng()() % 9)});
  }
  rig.engine().hint(hints);
  for (std::uint64_t i = rig.rng()() % 5; i > 0; --i) rig.land_one();
}

class EngineLaw : public ::testing::TestWithParam<std::size_t> {};

TEST_P(EngineLaw, OutputIsBitwiseTheSameWhateverTheCacheStateGuessesAndLandings) {
  const ModelShape shape = shapes()[GetParam()];
  const Model model(shape, test_seed() + GetParam());
  std::mt19937_64 rng(test_seed());
  const std::vector<Call> calls = make_calls(model.shape(), rng);
  std::vector<std::vector<std::byte>> expected;
  PlainForward plain(model);
  for (const Call& call : calls) expected.push_back(plain(call));

  std::uint64_t seed = test_seed();
  for (const std::int64_t slots : {1, 4, 16}) {
    for (const std::string& policy : policy_names()) {
      for (const Guesses guesses : {Guesses::kNone, Guesses::kRandom, Guesses::kAlwaysWrong}) {
        Rig rig(model, {.device_memory = model.slots(slots),
                        .policy = policy,
                        .depth = static_cast<int>(1 + seed % 4),
                        .seed = ++seed,
                        .events_pass_at_once = seed % 2 == 0});
        for (std::size_t i = 0; i < calls.size(); ++i) {
          if (guesses != Guesses::kNone) guess(rig, shape, calls[i], guesses);
          ASSERT_EQ(rig.forward(calls[i]), expected[i])
              << "call " << i << ", " << slots << " slots, " << policy << ", guesses "
              << static_cast<int>(guesses) << ", seed " << seed;
          rig.expect_slots_hold_their_experts();
          ASSERT_EQ(rig.num_leases(), 0);
        }
        const EngineStats stats = rig.engine().stats();
        EXPECT_EQ(stats.requests, stats.hits + stats.late + stats.misses);
        EXPECT_EQ(stats.forwards, static_cast<std::int64_t>(calls.size()));
        EXPECT_LE(stats.peak_resident_bytes, stats.budget_bytes);
        EXPECT_EQ(stats.bytes_read, stats.bytes_read_demand + stats.bytes_read_hint_used +
                                        stats.bytes_read_hint_wasted +
                                        stats.bytes_read_hint_pending);
      }
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Shapes, EngineLaw, ::testing::Range(std::size_t{0}, shapes().size()));

TEST(EngineLaw, AdoptedExpertsAreUsedInPlaceWhenAllOfThemFit) {
  ModelShape shape{.has_bias = true};
  shape.misalignment = 0;
  const Model model(shape, 7);
  std::mt19937_64 rng(7);
  PlainForward plain(model);
  Rig whole(model, {.device_memory = model.store()->total_slot_bytes()});
  Rig part(model, {.device_memory = model.store()->total_slot_bytes() - 1});
  for (const std::int64_t tokens : {1, 33}) {
    const Call call = make_call(shape, 1, {.num_tokens = tokens, .top_k = 3}, rng);
    const auto expected = plain(call);
    EXPECT_EQ(whole.forward(call), expected);
    EXPECT_EQ(part.forward(call), expected);
  }
  EXPECT_EQ(whole.engine().stats().slab_bytes, 0u);
  EXPECT_EQ(whole.engine().stats().misses, 0);
  EXPECT_GT(whole.engine().stats().hits, 0);
  EXPECT_GT(whole.engine().stats().adopted_bytes, 0u);
  EXPECT_GT(part.engine().stats().misses, 0);
}

}  // namespace
}  // namespace sluice::testing
