"""Every policy of the core against a reference in Python, on 100,000 random events."""

from __future__ import annotations

import random

import numpy as np
import pytest

from simulate import reference
from sluice import _core
from sluice.simulate import Routes, policy_names, replay

LAYERS, EXPERTS, EVENTS = 3, 8, 100_000


def random_events(seed: int) -> list[reference.Event]:
    """Visits of layers in order, some left out, with favourites that change."""
    rng = random.Random(seed)
    events: list[reference.Event] = []
    step = 0
    favourites: list[list[int]] = []
    while len(events) < EVENTS:
        if step % 500 == 0:
            favourites = [rng.sample(range(EXPERTS), 4) for _ in range(LAYERS)]
        for layer in range(LAYERS):
            if rng.random() < 0.05:
                continue
            wanted = favourites[layer] if rng.random() < 0.7 else range(EXPERTS)
            experts = rng.sample(wanted, rng.randint(1, 3))
            events.append((step, layer, experts))
        step += 1
    return events[:EVENTS]


EVENT_LIST = random_events(1)


def routes_of_events(events: list[reference.Event]) -> Routes:
    experts = [expert for _, _, each in events for expert in each]
    return Routes(
        num_layers=LAYERS,
        num_experts=EXPERTS,
        steps=np.array([step for step, _, _ in events], dtype=np.int64),
        layers=np.array([layer for _, layer, _ in events], dtype=np.int32),
        begins=np.cumsum([0, *(len(each) for _, _, each in events)]).astype(np.int64),
        experts=np.array(experts, dtype=np.int32),
        weights=None,
        rows=None,
        num_tokens=events[-1][0] + 1,
    )


ROUTES = routes_of_events(EVENT_LIST)
# Half of the time they say who comes next, else they lie: `forecast` is to change its mind.
SCORES = np.random.default_rng(2).random((EVENTS, EXPERTS)).astype(np.float32)
_next: dict[tuple[int, int], int] = {}
for _i in range(EVENTS - 1, -1, -1):
    _step, _layer, _experts = EVENT_LIST[_i]
    if (_i // 5000) % 2 == 0:
        SCORES[_i] = [1.0 / (1 + _next.get((_layer, e), 10**9) - _i) for e in range(EXPERTS)]
    for _e in _experts:
        _next[_layer, _e] = _i


def test_every_policy_has_a_reference() -> None:
    assert sorted([*reference.POLICIES, "belady"]) == policy_names()


@pytest.mark.parametrize("policy", sorted(reference.POLICIES))
def test_a_policy_equals_its_reference(policy: str) -> None:
    pooled = sorted(reference.POLICIES).index(policy) % 2 == 0  # one scope each: seconds count
    slots = [7] if pooled else [3, 2, 4]
    for bypass in (True, False):
        count = EVENTS if bypass else EVENTS // 5
        scores = SCORES[:count]
        expected = reference.replay(
            EVENT_LIST[:count],
            reference.POLICIES[policy],
            num_layers=LAYERS,
            num_experts=EXPERTS,
            slots=slots,
            bypass=bypass,
            scores=scores.tolist(),
        )
        counted = replay(
            ROUTES if bypass else routes_of_events(EVENT_LIST[:count]),
            policy,
            slots,
            scope="pool" if pooled else "layer",
            bypass=bypass,
            unscored=0,
            scores=scores,
        )
        totals = np.array(expected).sum(axis=0)
        got = [counted.hits.sum(), counted.first_uses.sum(), counted.returns.sum()]
        assert got == totals.tolist(), f"{policy}: bypass={bypass}"


def test_the_forecast_policy_changed_its_mind_in_the_test_above() -> None:
    """Else that test would compare decayed frequency with itself."""
    results = {
        policy: replay(ROUTES, policy, 3, unscored=0, scores=SCORES).hits.sum()
        for policy in ("forecast", "decayed-lfu", "forecast:always")
    }
    assert results["decayed-lfu"] < results["forecast"] != results["forecast:always"], results


def test_belady_misses_least_and_bypass_helps_it() -> None:
    for scope, slots in (("layer", 3), ("pool", 8)):
        best = replay(ROUTES, "belady", slots, scope=scope, unscored=0)
        forced = replay(ROUTES, "belady", slots, scope=scope, unscored=0, bypass=False)
        assert best.hits.sum() >= forced.hits.sum()
        for policy in _core.policy_names():
            other = replay(ROUTES, policy, slots, scope=scope, unscored=0, scores=SCORES)
            assert other.hits.sum() < best.hits.sum(), policy
