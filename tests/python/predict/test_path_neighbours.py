"""Nearest neighbours by hand: who is like whom, who may vote, and what is said of strangers."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest

from predict.small_traces import random_trace
from sluice.errors import CheckpointError, ConfigError
from sluice.predict import evaluate, make
from sluice.trace import Trace, TraceSequence


def trace_of(routes: list[list[list[int]]], ids: list[int] | None = None) -> Trace:
    """Sequences of one token each, experts of 8."""
    array = np.asarray(routes, np.int16)
    spans = tuple(TraceSequence(i, 1, content=f"{routes} {i}") for i in range(len(array)))
    tokens = None if ids is None else np.asarray(ids, np.int32)
    return Trace(experts=array, num_experts=8, sequences=spans, token_ids=tokens)


def test_votes_by_hand() -> None:
    stored = trace_of([[[0], [1], [2]], [[0], [3], [4]], [[5], [1], [6]], [[7], [7], [7]]])
    predictor: Any = make("path-neighbours", {"neighbours": 3, "temperature": 0.5, "decay": 0.5})
    predictor.fit(stored)
    scores = predictor.scores(trace_of([[[0], [1], [0]]]), 1)[0]
    # Before layer 1: tokens 0 and 1 share layer 0. Before layer 2: token 0 shares both (1 + .5 of
    # 1.5), token 2 the nearer layer (1 of 1.5), token 1 the further (.5 of 1.5), token 3 nothing.
    alike = np.array([1, 1 / 3, 2 / 3, 0])
    weights = np.exp((alike - 1) / 0.5) - np.exp(-1 / 0.5)
    share = weights / weights.sum()
    np.testing.assert_allclose(scores[1, [1, 3]], 0.5, atol=2e-3)
    np.testing.assert_allclose(scores[2, [2, 4, 6]], share[:3], atol=2e-3)
    assert scores[2, 7] < 2e-3


def test_who_is_like_nobody_gets_the_rates_of_all() -> None:
    stored = trace_of([[[0], [1]], [[0], [1]], [[0], [2]], [[3], [2]]])
    predictor: Any = make("path-neighbours")
    predictor.fit(stored)
    scores = predictor.scores(trace_of([[[5], [6]]]), 1)[0]
    np.testing.assert_allclose(scores[0, [0, 3]], [0.75, 0.25])
    np.testing.assert_allclose(scores[1, [1, 2]], [0.5, 0.5])


def test_the_same_token_is_alike_before_anything_has_routed() -> None:
    stored = trace_of([[[0], [1]], [[2], [3]], [[4], [5]]], ids=[7, 8, 9])
    predictor: Any = make("path-neighbours", {"neighbours": 1})
    predictor.fit(stored)
    asked = trace_of([[[6], [6]]], ids=[8])
    np.testing.assert_array_equal(predictor.scores(asked, "token")[0].argmax(-1), [2, 3])
    blind: Any = make("path-neighbours", {"neighbours": 1, "token": 0.0})
    blind.fit(stored)
    assert blind.scores(asked, "token")[0, 0].max() < 0.5


def test_a_running_sequences_own_tokens_vote_when_it_adapts() -> None:
    rng = np.random.default_rng(0)
    period = np.argsort(rng.random((6, 5, 16)), -1)[..., :2].astype(np.int16)
    routes = np.tile(period, (5, 1, 1))
    new = Trace(experts=routes, num_experts=16, sequences=(TraceSequence(0, 30, content="new"),))
    old = random_trace(1, sequences=(40,), layers=5, experts=16)
    reached: dict[bool, float] = {}
    for adapt in (False, True):
        predictor: Any = make("path-neighbours", {"adapt": adapt, "neighbours": 4})
        predictor.fit(old)
        late = evaluate(predictor, new, horizons=(1,), first_layer=1, batches=()).of(1)
        reached[adapt] = late.depths[0].recall
    assert reached[True] > 0.75 and reached[False] < 0.4


def test_a_bounded_store_is_picked_evenly() -> None:
    trace = random_trace(2, sequences=(50, 51))
    predictor: Any = make("path-neighbours", {"capacity": 11})
    predictor.fit(trace)
    assert predictor.fitting.notes == {"paths": 11}
    np.testing.assert_array_equal(predictor.state()["routes"], trace.experts[::10])


def test_stored_experts_that_there_are_not_are_refused() -> None:
    trace = random_trace(2, sequences=(20,))
    predictor: Any = make("path-neighbours")
    predictor.fit(trace)
    arrays = predictor.state()
    arrays["routes"] = arrays["routes"] + 8
    with pytest.raises(CheckpointError, match="experts of 8 to 15"):
        predictor.load_state(arrays)


def test_unknown_ids_are_like_nobodys() -> None:
    trace = random_trace(3, sequences=(20, 20))
    nameless = dataclasses.replace(trace, token_ids=None)
    with_ids: Any = make("path-neighbours")
    without: Any = make("path-neighbours")
    with_ids.fit(trace.select([0]))
    without.fit(nameless.select([0]))
    asked = nameless.select([1])
    top = [each.scores(asked, 1)[:, 2].argmax(-1) for each in (with_ids, without)]
    np.testing.assert_array_equal(*top)


@pytest.mark.parametrize(
    "settings", [{"decay": 0}, {"decay": 1.5}, {"neighbours": 0}, {"token": -1}]
)
def test_settings_that_cannot_work_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        make("path-neighbours", settings)
