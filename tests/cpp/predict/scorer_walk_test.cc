// Random walks over what an engine may ask of scorers, in whatever order, with rows of strangers
// and hostile ids: nothing breaks, and what they say are probabilities.
#include <gtest/gtest.h>

#include <cmath>
#include <memory>
#include <random>
#include <vector>

#include "base/error.h"
#include "predict/scorers.h"
#include "support/seed.h"

namespace sluice {
namespace {

constexpr std::int32_t kLayers = 3;
constexpr std::int32_t kExperts = 6;
constexpr std::int32_t kTopK = 2;
constexpr std::int32_t kWidth = 5;

std::vector<float> some(std::mt19937_64& rng, std::size_t count) {
  std::vector<float> values(count);
  for (float& each : values) each = static_cast<float>(rng() % 2000) / 1000 - 1;
  return values;
}

ForecastTables forecast(std::mt19937_64& rng) {
  constexpr std::size_t wide = 4;
  constexpr std::size_t units = 3;
  constexpr std::size_t features = 4 + 2 + 2;  // of usage, half-lives, discounts
  ForecastTables tables{.num_layers = kLayers,
                        .num_experts = kExperts,
                        .top_k = kTopK,
                        .window = 3,
                        .prompt_tokens = 4,
                        .usage = {.half_lives = {2, 8}, .never = 50},
                        .memory = {.routes = {},
                                   .sequence = {},
                                   .recent = 5,
                                   .running = 5,
                                   .previous = 2,
                                   .fade = 0.8F,
                                   .floor = 1e-3F},
                        .discounts = {0.5F, 0.9F},
                        .context = {3, 5},
                        .head = {}};
  for (int i = 0; i < 9; ++i) {
    for (int j = 0; j < kLayers * kTopK; ++j) {
      tables.memory.routes.push_back(static_cast<std::int16_t>(rng() % kExperts));
    }
    tables.memory.sequence.push_back(i / 4);
  }
  ForecastHeadTables& head = tables.head;
  head.hidden = wide;
  head.units = units;
  head.prefix = some(rng, kLayers * kExperts * wide);
  head.own = some(rng, kLayers * kExperts * wide);
  head.bias = some(rng, kLayers * wide);
  head.place = some(rng, kLayers * 2 * kExperts * wide);
  head.position = some(rng, wide);
  head.place_bias = some(rng, wide);
  head.certain = some(rng, 2 * wide);
  head.gate = some(rng, kLayers * wide * units);
  head.expert_in = some(rng, units * features);
  head.expert_in_bias = some(rng, units);
  head.out = some(rng, kLayers * 2 * wide * kExperts);
  head.out_bias = some(rng, kLayers * 2 * kExperts);
  head.expert_out = some(rng, 2 * units);
  head.expert_out_bias = some(rng, 2);
  return tables;
}

GateTables gates(std::mt19937_64& rng) {
  return {.num_layers = kLayers,
          .num_experts = kExperts,
          .width = kWidth,
          .max_layers = 2,
          .top_k = kTopK,
          .gate = some(rng, kLayers * kExperts * kWidth),
          .bias = some(rng, kLayers * kExperts),
          .correction = some(rng, kLayers * kExperts),
          .scale = some(rng, kLayers * kWidth),
          .shift = some(rng, kLayers * kWidth),
          .sigmoid = {0, 1, 0},
          .centred = {1, 0, 0},
          .ids = {-7, 3, 90},
          .means = std::vector<std::uint16_t>(4 * kLayers * kWidth, 0x3c00),
          .curves = some(rng, kLayers * 2 * 4)};
}

void check(const LayerScores& ranked) {
  ASSERT_EQ(ranked.scores.size() % kExperts, 0u);
  const auto rows = static_cast<std::int32_t>(ranked.scores.size() / kExperts);
  ASSERT_LE(to_int(ranked.first_layer) + rows, kLayers);
  for (const float score : ranked.scores) ASSERT_TRUE(score >= 0 && score <= 1) << score;
}

void check(const std::vector<LayerGuess>& guesses) {
  for (const LayerGuess& guess : guesses) {
    ASSERT_GE(to_int(guess.key.layer), 0);
    ASSERT_LT(to_int(guess.key.layer), kLayers);
    ASSERT_LT(to_int(guess.key.expert), kExperts);
    ASSERT_TRUE(guess.probability > 0 && guess.probability <= 1) << guess.probability;
    ASSERT_TRUE(guess.layers_ahead >= 1 && guess.layers_ahead <= kLayers);
  }
}

void walk(Scorer& scorer, std::mt19937_64& rng, int steps) {
  int ranked = 0;
  std::vector<LayerGuess> guesses;
  Grouping grouping;
  for (int step = 0; step < steps; ++step) {
    const bool told = rng() % 8 != 0;
    const std::size_t batch = rng() % 11;
    const std::int64_t tokens = rng() % 3 == 0 ? 1 + static_cast<std::int64_t>(rng() % 7) : 1;
    std::vector<std::int64_t> requests;
    for (std::size_t i = 0; i < batch; ++i) {
      requests.push_back(static_cast<std::int64_t>(rng() % 40 == 0 ? 7 : rng() % 60));
    }
    std::vector<std::int64_t> ids(rng() % 2 == 0 ? 0 : batch * static_cast<std::size_t>(tokens), 3);
    if (told) {
      const std::int64_t claimed = rng() % 30 == 0 ? std::int64_t{1} << 62 : tokens;
      scorer.begin_step({.requests = requests, .tokens = claimed, .token_ids = ids});
    }
    for (std::int32_t layer = 0; layer < kLayers; ++layer) {
      if (rng() % 25 == 0) continue;  // a layer that somebody left out
      const std::int64_t stranger = rng() % 25 == 0 ? 1 : 0;
      const std::int64_t rows = static_cast<std::int64_t>(batch) * tokens + stranger;
      const std::int64_t top_k = rng() % 20 == 0 ? 3 : kTopK;
      std::vector<std::int64_t> experts;
      for (std::int64_t i = 0; i < rows * top_k; ++i) {
        const bool hostile = rng() % 12 == 0;
        experts.push_back(hostile ? static_cast<std::int64_t>(rng())
                                  : std::int64_t(rng() % kExperts));
      }
      const std::vector<float> weights = some(rng, experts.size());
      const std::vector<float> hidden = some(rng, static_cast<std::size_t>(rows) * kWidth);
      const ForwardArgs args{.layer = LayerIdx{layer},
                             .num_tokens = rows,
                             .top_k = top_k,
                             .activations = DType::kF32,
                             .weights_dtype = DType::kF32,
                             .hidden = hidden.data(),
                             .expert_ids = experts.data(),
                             .weights = weights.data(),
                             .out = nullptr,
                             .stream = {}};
      grouping.assign(args, kExperts);
      const LayerScores scores = scorer.rank(args);
      check(scores);
      ranked += !scores.scores.empty();
      guesses.clear();
      scorer.guess(args, grouping, guesses);
      check(guesses);
      if (::testing::Test::HasFatalFailure()) return;
    }
  }
  EXPECT_TRUE(!scorer.shape().reads_weights || ranked > steps / 4) << ranked;
}

TEST(ScorerWalk, Forecaster) {
  std::mt19937_64 rng(testing::test_seed());
  walk(*make_forecast_scorer(forecast(rng)), rng, 3000);
}

TEST(ScorerWalk, Gates) {
  std::mt19937_64 rng(testing::test_seed());
  walk(*make_gate_scorer(gates(rng)), rng, 1000);
}

TEST(ScorerWalk, Pairs) {
  std::mt19937_64 rng(testing::test_seed());
  std::vector<float> pairs = some(rng, kLayers * kExperts * kExperts);
  for (float& each : pairs) each = std::abs(each);
  walk(*make_pair_scorer(pairs, kLayers, kExperts), rng, 1000);
}

TEST(Scorers, RefuseTablesThatDoNotFit) {
  std::mt19937_64 rng(testing::test_seed());
  ForecastTables forecaster = forecast(rng);
  forecaster.head.own.pop_back();
  EXPECT_THROW((void)make_forecast_scorer(forecaster), ConfigError);
  forecaster = forecast(rng);
  forecaster.memory.sequence.push_back(9);
  EXPECT_THROW((void)make_forecast_scorer(forecaster), ConfigError);
  GateTables wide = gates(rng);
  wide.width = -1;
  EXPECT_THROW((void)make_gate_scorer(wide), ConfigError);
  EXPECT_THROW((void)make_pair_scorer({}, 0, 3), ConfigError);
}

}  // namespace
}  // namespace sluice
