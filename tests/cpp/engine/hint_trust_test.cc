#include "engine/hint_trust.h"

#include <gtest/gtest.h>

#include <vector>

namespace sluice {
namespace {

/// Follows a guess for layer 0 if it is admitted, then runs the layer until the guess is judged.
bool guess(HintTrust& trust, bool comes_true) {
  if (!trust.admits(LayerIdx{0})) return false;
  trust.began(make_key(0, 3));
  const std::vector<ExpertIdx> asked = {ExpertIdx{comes_true ? 3 : 4}};
  for (int visit = 0; visit < 2; ++visit) trust.on_event(LayerIdx{0}, asked);
  return true;
}

int admitted_of(HintTrust& trust, int count, bool come_true) {
  int admitted = 0;
  for (int i = 0; i < count; ++i) admitted += guess(trust, come_true) ? 1 : 0;
  return admitted;
}

TEST(HintTrust, FollowsWhatComesTrue) {
  HintTrust trust(2);
  EXPECT_EQ(admitted_of(trust, 500, true), 500);
}

TEST(HintTrust, LiesAreFollowedUntilTheFirstOutcomesAreKnown) {
  HintTrust trust(2);
  EXPECT_LE(admitted_of(trust, 500, false), 12);
}

TEST(HintTrust, AThirdThatComesTrueIsEnough) {
  HintTrust trust(2);
  int admitted = 0;
  for (int i = 0; i < 300; ++i) admitted += guess(trust, i % 3 == 0) ? 1 : 0;
  EXPECT_EQ(admitted, 300);
}

TEST(HintTrust, WhoTurnsLiarIsFoundOut) {
  HintTrust trust(2);
  (void)admitted_of(trust, 1000, true);
  EXPECT_LE(admitted_of(trust, 1000, false), 100);
}

TEST(HintTrust, ProbesByDemandsAndIsConvincedAgain) {
  HintTrust trust(2);
  (void)admitted_of(trust, 100, false);
  EXPECT_EQ(admitted_of(trust, 100, true), 0) << "no demands, no probes";
  int admitted = 0;
  for (int i = 0; i < 64 * 400; ++i) {
    trust.on_demand();
    admitted += guess(trust, true) ? 1 : 0;
  }
  EXPECT_GT(admitted, 1000) << "once probes have come true, everything is followed again";
  HintTrust liar(2);
  (void)admitted_of(liar, 100, false);
  int probes = 0;
  for (int i = 0; i < 64 * 100; ++i) {
    liar.on_demand();
    probes += guess(liar, false) ? 1 : 0;
  }
  EXPECT_LE(probes, 101);
}

TEST(HintTrust, WhatLeftUnusedWasWrong) {
  HintTrust trust(2);
  for (int i = 0; i < 20 && trust.admits(LayerIdx{0}); ++i) {
    trust.began(make_key(0, 3));
    trust.left(make_key(0, 3));
  }
  EXPECT_FALSE(trust.admits(LayerIdx{0}));
}

// The first guess for a layer comes true, the second never does: only the second is refused.
TEST(HintTrust, RanksOfALayerAreJudgedApart) {
  HintTrust trust(2);
  int first = 0;
  int second = 0;
  int elsewhere = 0;
  for (int i = 0; i < 200; ++i) {
    const auto follow = [&](ExpertKey key) {
      if (!trust.admits(key.layer)) return 0;
      trust.began(key);
      return 1;
    };
    first += follow(make_key(0, 3));
    second += follow(make_key(0, 5));
    elsewhere += follow(make_key(1, 3));
    elsewhere += follow(make_key(1, 5));
    const std::vector<ExpertIdx> asked = {ExpertIdx{3}};
    const std::vector<ExpertIdx> both = {ExpertIdx{3}, ExpertIdx{5}};
    for (int visit = 0; visit < 2; ++visit) {
      trust.on_event(LayerIdx{0}, asked);
      trust.on_event(LayerIdx{1}, both);
    }
  }
  EXPECT_EQ(first, 200);
  EXPECT_LE(second, 9);
  EXPECT_EQ(elsewhere, 400);
}

TEST(HintTrust, SoManyOpenGuessesAndNoMore) {
  HintTrust trust(2);
  int open = 0;
  while (trust.admits(LayerIdx{1}) && open < 1000) trust.began(make_key(1, open++));
  EXPECT_EQ(open, 256);
  trust.left(make_key(1, 0));
  EXPECT_TRUE(trust.admits(LayerIdx{1}));
}

}  // namespace
}  // namespace sluice
