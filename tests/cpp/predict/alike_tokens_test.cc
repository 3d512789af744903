#include "predict/alike_tokens.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <map>
#include <optional>
#include <random>
#include <vector>

#include "base/error.h"
#include "support/seed.h"

namespace sluice {
namespace {

constexpr std::int32_t kLayers = 3;
constexpr std::int32_t kExperts = 7;
constexpr std::int32_t kTopK = 2;
constexpr std::int32_t kWindow = 4;
constexpr std::int32_t kRecent = 5;

using Routes = std::vector<std::int16_t>;  // [S, K]

/// A remembered token, and the definition of what it is alike to.
struct Token {
  Routes routes;
  std::optional<std::size_t> before;  // in the list of all
};

Routes drawn(std::mt19937_64& rng) {
  Routes routes;
  for (std::int32_t l = 0; l < kLayers; ++l) {
    const auto first = static_cast<std::int16_t>(rng() % kExperts);
    routes.push_back(first);
    routes.push_back(rng() % 5 == 0
                         ? std::int16_t{-1}
                         : static_cast<std::int16_t>((first + 1 + rng() % 3) % kExperts));
  }
  return routes;
}

int in_common(const Routes& a, const Routes& b, std::int32_t layer) {
  int found = 0;
  for (std::int32_t k = 0; k < kTopK; ++k) {
    for (std::int32_t j = 0; j < kTopK; ++j) {
      const auto at = static_cast<std::size_t>(layer * kTopK);
      const std::int16_t mine = a[at + static_cast<std::size_t>(k)];
      found += mine >= 0 && mine == b[at + static_cast<std::size_t>(j)];
    }
  }
  return found;
}

int in_common(const Routes& a, const Routes& b) {
  int found = 0;
  for (std::int32_t l = 0; l < kLayers; ++l) found += in_common(a, b, l);
  return found;
}

MemoryTables tables_of(const std::vector<Token>& tokens, std::int32_t recent) {
  MemoryTables tables{.routes = {},
                      .sequence = {},
                      .recent = recent,
                      .running = 6,
                      .previous = 3,
                      .fade = 0.8F,
                      .floor = 1e-3F};
  std::int64_t sequence = 0;
  for (const Token& token : tokens) {
    tables.routes.insert(tables.routes.end(), token.routes.begin(), token.routes.end());
    sequence += token.before ? 0 : 1;
    tables.sequence.push_back(sequence);
  }
  return tables;
}

// Fitted tokens, then a text of which the newest `kRecent` count, against the formula.
TEST(AlikeTokens, FindWhoTheFormulaFinds) {
  std::mt19937_64 rng(testing::test_seed());
  std::vector<Token> tokens;
  for (std::size_t i = 0; i < 70; ++i) {
    tokens.push_back({drawn(rng), i % 9 == 0 ? std::nullopt : std::optional(i - 1)});
  }
  const std::size_t fitted = tokens.size();
  AlikeTokens alike(tables_of(tokens, kRecent), kLayers, kExperts, kTopK, kWindow);
  const std::vector<std::uint8_t> nothing(kLayers * kExperts);

  std::map<std::int32_t, std::size_t> place_of;  // column -> token
  for (std::size_t i = 0; i < fitted; ++i) place_of[static_cast<std::int32_t>(i)] = i;
  AlikeTokens::Looking looking;
  std::vector<std::uint16_t> overlap;
  Routes previous;
  std::int32_t column = -1;
  for (int turn = 0; turn < 40; ++turn) {
    const Routes mine = drawn(rng);
    alike.begin(looking, overlap);
    double scale = 0;
    std::vector<double> running(tokens.size());
    for (std::int32_t l = 0; l < kLayers; ++l) {
      const std::vector<std::int32_t> ids(mine.begin() + l * kTopK, mine.begin() + (l + 1) * kTopK);
      const AlikeTokens::Found found = alike.look(looking, LayerIdx{l}, ids);
      scale = scale * 0.8 + 1;
      double best = -1e9;
      std::map<std::size_t, double> likely;
      for (const auto& [at, i] : place_of) {
        running[i] = running[i] * 0.8 + in_common(mine, tokens[i].routes, l) / double{kTopK};
        likely[i] = running[i] * 6 / scale;
        const auto before = tokens[i].before;
        if (!previous.empty() && before) {
          likely[i] += 3.0 * in_common(previous, tokens[*before].routes) / (kLayers * kTopK);
        }
        best = std::max(best, likely[i]);
      }
      double total = 0;
      for (auto& [i, value] : likely) total += value = std::exp(value - best);
      EXPECT_NEAR(found.sure[0], best / 9, 1e-4);
      double sum = 0;
      for (std::size_t c = 0; c < found.columns.size(); ++c) {
        ASSERT_TRUE(place_of.contains(found.columns[c])) << "a column that does not count";
        const double weight = likely[place_of[found.columns[c]]] / total;
        EXPECT_NEAR(found.weights[c], weight, 1e-2 * weight + 1e-3);
        sum += found.weights[c];
      }
      EXPECT_NEAR(sum, 1, 1e-4);
      EXPECT_NEAR(found.sure[1], std::log(total) / 8, 2e-2);
    }
    overlap = looking.overlap;
    previous = mine;
    // The token joins at once, with no future.
    const std::int32_t joined = alike.add(mine, nothing, column);
    const bool follows = place_of.contains(column);
    tokens.push_back({mine, follows ? std::optional(place_of[column]) : std::nullopt});
    place_of[joined] = tokens.size() - 1;
    column = joined;
    // The oldest does not count any more, but is still there as what came before the next.
    if (turn + 1 > kRecent) {
      const std::size_t oldest = tokens.size() - 1 - kRecent;
      std::erase_if(place_of, [&](const auto& each) { return each.second == oldest; });
    }
  }
}

TEST(AlikeTokens, FollowsFittedTokensWithinTheirSequence) {
  std::vector<Token> tokens(6);
  for (std::size_t i = 0; i < 6; ++i) {
    tokens[i].routes.assign(kLayers * kTopK, -1);
    tokens[i].routes[0] = static_cast<std::int16_t>(i % 3);
    if (i != 0 && i != 4) tokens[i].before = i - 1;
  }
  const AlikeTokens alike(tables_of(tokens, 0), kLayers, kExperts, kTopK, kWindow);
  const auto next = [&](std::int32_t column, std::size_t expert) {
    return int{alike.next_uses(column, LayerIdx{0})[expert]};
  };
  EXPECT_EQ(next(0, 0), 3);
  EXPECT_EQ(next(0, 1), 1);
  EXPECT_EQ(next(0, 2), 2);
  EXPECT_EQ(next(2, 1), 0) << "used again, in the next sequence";
  EXPECT_EQ(next(4, 2), 1);
}

TEST(AlikeTokens, WithoutAnybodyFindNobody) {
  AlikeTokens alike(tables_of({}, 0), kLayers, kExperts, kTopK, kWindow);
  AlikeTokens::Looking looking;
  alike.begin(looking, {});
  const std::vector<std::int32_t> ids{1, 2};
  const AlikeTokens::Found found = alike.look(looking, LayerIdx{0}, ids);
  EXPECT_TRUE(found.columns.empty());
  EXPECT_EQ(found.sure[0], 0);
  EXPECT_EQ(alike.add(Routes(kLayers * kTopK, 0), std::vector<std::uint8_t>(21), -1), -1);
}

TEST(AlikeTokens, RefuseWhatBytesCannotCount) {
  const auto make = [](std::int32_t layers, std::int32_t top_k, std::int32_t window) {
    return AlikeTokens(tables_of({}, 1), layers, kExperts, top_k, window);
  };
  EXPECT_THROW(make(1, 256, 4), ConfigError);
  EXPECT_THROW(make(1 << 30, 200, 4), ConfigError);
  EXPECT_THROW(make(1, 2, 256), ConfigError);
}

}  // namespace
}  // namespace sluice
