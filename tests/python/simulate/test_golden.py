"""The replay of real routes that everybody can do again, and a trace that a person can check."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from sluice.simulate import order_of, popular_experts, replay, routes_of
from sluice.trace import Trace, TraceSequence, concatenate, load

DATA = Path(__file__).parents[3] / "benchmarks" / "data"
TASKS = ("intent", "summary", "translation")
SLOTS = (8, 16, 32)

# Hits in %, DeepSeek-V2-Lite, 8 / 16 / 32 of 64 experts per layer, second half of each task's
# sequences, one token an event, cold. LRU also as papers replay it that forget the event.
GOLDEN = {
    ("intent", "lru"): (30.6, 50.3, 73.5),
    ("intent", "decayed-lfu:16"): (31.5, 50.2, 75.3),
    ("intent", "static"): (33.2, 52.9, 77.9),
    ("intent", "belady"): (54.0, 71.4, 88.1),
    ("summary", "lru"): (33.4, 49.4, 74.1),
    ("summary", "decayed-lfu:16"): (33.5, 51.9, 76.6),
    ("summary", "static"): (31.2, 48.5, 73.5),
    ("summary", "belady"): (54.6, 71.8, 88.8),
    ("translation", "lru"): (32.1, 61.4, 84.8),
    ("translation", "decayed-lfu:16"): (44.3, 64.7, 85.1),
    ("translation", "static"): (45.0, 64.6, 84.9),
    ("translation", "belady"): (59.7, 78.9, 93.1),
    ("mix", "lru"): (32.6, 52.3, 76.8),
    ("mix", "decayed-lfu:16"): (35.7, 54.6, 78.2),
    ("mix", "static"): (28.3, 46.2, 71.5),
    ("mix", "belady"): (55.8, 73.6, 89.9),
    ("balanced", "lru"): (32.1, 53.7, 77.5),
    ("balanced", "decayed-lfu:16"): (36.0, 55.1, 78.6),
    ("balanced", "belady"): (56.1, 74.1, 90.1),
}
GOLDEN_ONE_BY_ONE = {
    "intent": (26.1, 47.2, 72.6),
    "summary": (29.0, 47.0, 73.1),
    "translation": (27.6, 58.5, 84.2),
    "mix": (28.2, 49.7, 75.9),
}


@pytest.fixture(scope="module")
def halves() -> tuple[Trace, Trace]:
    traces = [load(DATA / f"deepseek_v2_lite_{task}.trace.safetensors") for task in TASKS]
    first = [t.select(range(len(t.sequences) // 2)) for t in traces]
    second = [t.select(range(len(t.sequences) // 2, len(t.sequences))) for t in traces]
    return concatenate(first), concatenate(second)


def stream_of(trace: Trace, stream: str) -> Trace:
    if stream in TASKS:
        return trace.of_task(stream)
    return trace.select(order_of(trace, stream))


@pytest.mark.parametrize("stream", [*TASKS, "mix", "balanced"])
def test_hits_are_those_of_the_golden_table(stream: str, halves: tuple[Trace, Trace]) -> None:
    fit, test = (stream_of(half, stream) for half in halves)
    routes = routes_of(test)
    for (of, policy), expected in GOLDEN.items():
        if of != stream:
            continue
        for slots, percent in zip(SLOTS, expected, strict=True):
            preloaded = popular_experts(fit, slots) if policy == "static" else ()
            hits = replay(routes, policy, slots, unscored=0, preloaded=preloaded).hit_ratio
            assert 100 * hits == pytest.approx(percent, abs=0.1), (policy, slots)


@pytest.mark.parametrize("stream", GOLDEN_ONE_BY_ONE)
def test_expert_by_expert_looks_worse(stream: str, halves: tuple[Trace, Trace]) -> None:
    """Each expert an event of its own: what an event evicts it may still need."""
    test = stream_of(halves[1], stream)
    tokens, layers, top_k = test.experts.shape
    alone = test.experts.transpose(0, 2, 1).reshape(tokens * top_k, layers, 1)
    apart = Trace(
        experts=np.ascontiguousarray(alone),
        num_experts=test.num_experts,
        sequences=(TraceSequence(0, tokens * top_k),),
    )
    routes = routes_of(apart)
    for slots, percent in zip(SLOTS, GOLDEN_ONE_BY_ONE[stream], strict=True):
        hits = replay(routes, "lru", slots, unscored=0).hit_ratio
        assert 100 * hits == pytest.approx(percent, abs=0.1), slots


@pytest.mark.parametrize("slots", SLOTS)
def test_least_stale_is_lru_where_layers_are_apart(slots: int, halves: tuple[Trace, Trace]) -> None:
    routes = routes_of(stream_of(halves[1], "translation"))
    lru, stale = (replay(routes, policy, slots) for policy in ("lru", "least-stale"))
    assert lru.hits.tolist() == stale.hits.tolist()


# 3 layers, 4 experts, 5 steps, 2 slots a layer. Worked out by hand, one line a step and layer:
# what is asked for -> what LRU holds after it (h: hit).
HAND = np.array(
    [
        [[0, 1], [2, 0], [3, 1]],  # 01     20     31
        [[0, 2], [2, 0], [1, 3]],  # 0h2    2h0h   1h3h
        [[1, 3], [2, 1], [3, 0]],  # 13     2h1    3h0
        [[0, 1], [0, 2], [1, 3]],  # 01h    02h    13h
        [[0, 2], [2, 0], [3, 1]],  # 0h2    2h0h   3h1h
    ],
    dtype=np.int16,
)
HAND_HITS = {
    "lru": (3, 6, 6),
    # 2 of step 1, 3 of step 2 and 1 (layer 1), 0 (layer 2) of step 2 are served and not kept.
    "belady": (5, 7, 7),
}


@pytest.mark.parametrize("policy", HAND_HITS)
def test_a_trace_that_a_person_can_check(policy: str) -> None:
    trace = Trace(experts=HAND, num_experts=4, sequences=(TraceSequence(0, 5),))
    result = replay(routes_of(trace), policy, 2, unscored=0)
    assert tuple(result.hits) == HAND_HITS[policy]
    assert result.requests.tolist() == [10, 10, 10]
