#include "engine/hint_trust.h"

#include <gtest/gtest.h>

#include <vector>

namespace sluice {
namespace {

/// Follows a guess for layer 0 if it is admitted, then runs the layer until the guess is judged.
bool guess(HintTrust& trust, bool comes_true) {
  if (!trust.admits()) return false;
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
  HintTrust trust;
  EXPECT_EQ(admitted_of(trust, 500, true), 500);
}

TEST(HintTrust, LiesAreFollowedUntilTheFirstOutcomesAreKnown) {
  HintTrust trust;
  EXPECT_LE(admitted_of(trust, 500, false), 12);
}

TEST(HintTrust, AThirdThatComesTrueIsEnough) {
  HintTrust trust;
  int admitted = 0;
  for (int i = 0; i < 300; ++i) admitted += guess(trust, i % 3 == 0) ? 1 : 0;
  EXPECT_EQ(admitted, 300);
}

TEST(HintTrust, WhoTurnsLiarIsFoundOut) {
  HintTrust trust;
  (void)admitted_of(trust, 1000, true);
  EXPECT_LE(admitted_of(trust, 1000, false), 100);
}

TEST(HintTrust, ProbesByDemandsAndIsConvincedAgain) {
  HintTrust trust;
  (void)admitted_of(trust, 100, false);
  EXPECT_EQ(admitted_of(trust, 100, true), 0) << "no demands, no probes";
  int admitted = 0;
  for (int i = 0; i < 64 * 400; ++i) {
    trust.on_demand();
    admitted += guess(trust, true) ? 1 : 0;
  }
  EXPECT_GT(admitted, 1000) << "once probes have come true, everything is followed again";
  HintTrust liar;
  (void)admitted_of(liar, 100, false);
  int probes = 0;
  for (int i = 0; i < 64 * 100; ++i) {
    liar.on_demand();
    probes += guess(liar, false) ? 1 : 0;
  }
  EXPECT_LE(probes, 101);
}

TEST(HintTrust, WhatLeftUnusedWasWrong) {
  HintTrust trust;
  for (int i = 0; i < 20 && trust.admits(); ++i) {
    trust.began(make_key(0, 3));
    trust.left(make_key(0, 3));
  }
  EXPECT_FALSE(trust.admits());
}

TEST(HintTrust, SoManyOpenGuessesAndNoMore) {
  HintTrust trust;
  int open = 0;
  while (trust.admits() && open < 1000) trust.began(make_key(1, open++));
  EXPECT_EQ(open, 256);
  trust.left(make_key(1, 0));
  EXPECT_TRUE(trust.admits());
}

}  // namespace
}  // namespace sluice
