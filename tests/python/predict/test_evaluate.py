"""Metrics by hand, and what an evaluation refuses."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from predict.small_traces import random_trace
from sluice.errors import ConfigError
from sluice.predict import Guess, RoutingEvent, evaluate, make
from sluice.predict.evaluation import metrics
from sluice.trace import Trace, TraceSequence


class Fixed:
    """Scores that a test wrote down."""

    name = "fixed"

    def __init__(self, scores: Any) -> None:
        self._scores = np.asarray(scores, np.float32)

    def begin_step(self, step: int, requests: Any, token_ids: Any, tasks: Sequence[str]) -> None:
        raise AssertionError("scores are there")

    observe = plan = forecast = begin_step

    def scores(self, trace: Trace, horizon: Any) -> Any:
        return self._scores[: trace.num_tokens]


def two_tokens() -> tuple[Fixed, Trace]:
    """Two sequences of one token, two layers, top 2 of 4."""
    routes = np.array([[[0, 1], [2, 3]], [[0, 3], [1, 2]]], np.int16)
    scores = [
        [[0.9, 0.8, 0.2, 0.1], [0.9, 0.1, 0.8, 0.7]],  # both; one of two (expert 2 second)
        [[0.1, 0.9, 0.8, 0.2], [0.6, 0.5, 0.5, 0.5]],  # none; 1 is second, 2 third by its id
    ]
    spans = (
        TraceSequence(0, 1, task="a", content="one"),
        TraceSequence(1, 1, task="b", content="two"),
    )
    return Fixed(scores), Trace(experts=routes, num_experts=4, sequences=spans)


def test_recall_and_precision_by_hand() -> None:
    predictor, trace = two_tokens()
    result = evaluate(predictor, trace, horizons=(1,), depths=(1, 2, 3), batches=()).of(1)
    by_n = {depth.n: depth for depth in result.depths}
    # hits at 2: 2, 1 | 0, 1 of 2 each; at 3: 2, 2 | 1, 2 (token 1, layer 0: 1, 2, 3 come first)
    assert by_n[2].recall == pytest.approx(4 / 8)
    assert by_n[2].precision == pytest.approx(4 / 8)
    assert by_n[3].recall == pytest.approx(7 / 8)
    assert by_n[3].precision == pytest.approx(7 / 12)
    assert by_n[1].recall == pytest.approx((1 + 0 + 0 + 0) / 8)
    assert by_n[2].by_task == {"a": pytest.approx(3 / 4), "b": pytest.approx(1 / 4)}
    assert by_n[2].task_mean == pytest.approx(1 / 2)
    assert by_n[2].by_layer == (pytest.approx(2 / 4), pytest.approx(2 / 4))
    assert result.exact_set == pytest.approx(1 / 4)
    assert result.at_least_half == pytest.approx(3 / 4)


def test_layers_before_the_first_scored_one_are_in_no_figure() -> None:
    predictor, trace = two_tokens()
    result = evaluate(predictor, trace, horizons=(1,), depths=(2,), first_layer=1).of(1)
    assert result.depths[0].recall == pytest.approx(2 / 4)
    assert result.depths[0].by_layer == (pytest.approx(2 / 4),)
    assert result.unions[0].b_acc == pytest.approx(2 / 4)


def test_of_a_phase_only_its_tokens_are_scored() -> None:
    predictor, trace = two_tokens()
    whole = (dataclasses.replace(trace.sequences[0], length=2, prompt_tokens=1),)
    one = dataclasses.replace(trace, sequences=whole)
    for phase, recalls in (("prefill", (3 / 4, 1 / 2)), ("decode", (1 / 4, 1 / 2)), ("all", ())):
        result = evaluate(predictor, one, horizons=(1,), depths=(2,), batches=(1,), phase=phase)
        depth = result.of(1).depths[0]
        if recalls:
            assert result.tokens == 1 and depth.recall == pytest.approx(recalls[0])
            assert depth.by_layer[1] == pytest.approx(recalls[1])
            assert result.of(1).unions[0].b_acc == pytest.approx(recalls[0])
        else:
            assert result.tokens == 2 and depth.recall == pytest.approx(1 / 2)
    with pytest.raises(ConfigError, match="does not say where its prompt ends"):
        evaluate(predictor, trace, phase="decode")
    with pytest.raises(ConfigError, match="expected one of all, decode, prefill"):
        evaluate(predictor, one, phase="warm")
    read = (dataclasses.replace(whole[0], prompt_tokens=2),)
    with pytest.raises(ConfigError, match="no token of phase 'decode'"):
        evaluate(predictor, dataclasses.replace(trace, sequences=read), phase="decode")


def test_b_acc_by_hand() -> None:
    predictor, trace = two_tokens()
    result = evaluate(
        predictor, trace, horizons=("token",), batches=(1, 2), set_sizes=(1.0, 1.5)
    ).of("token")
    rows = {(union.batch, union.set_size): union for union in result.unions}
    # Batch 2, layer 0: T = {0, 1, 3}; noisy-or .91, .98, .84, .28: the first three hold 0 and 1.
    # Layer 1: T = {1, 2, 3}; .96, .55, .90, .85: the first three hold 2 and 3.
    assert rows[2, 1.0].b_acc == pytest.approx(2 / 3)
    assert rows[2, 1.0].precision == pytest.approx(2 / 3)
    assert rows[2, 1.0].true_experts == 3
    assert rows[2, 1.5].b_acc == 1 and rows[2, 1.5].precision == pytest.approx(3 / 4)
    assert rows[1, 1.0].b_acc == pytest.approx(4 / 8)
    assert rows[1, 1.5].b_acc == pytest.approx(7 / 8)


def test_predicting_everything_scores_one_and_is_shown_with_its_precision() -> None:
    trace = random_trace(1, sequences=(10, 10, 10, 10), experts=8, top_k=2)
    predictor = Fixed(np.ones((40, 4, 8)))
    result = evaluate(predictor, trace, batches=(1, 4)).of("token")
    everything = {union.batch: union for union in result.unions if union.set_size is None}
    assert everything[1].b_acc == 1.0
    assert everything[1].precision == pytest.approx(2 / 8)
    assert everything[4].b_acc == 1.0
    assert everything[4].precision == pytest.approx(everything[4].true_experts / 8)


def test_set_sizes_round_half_up_and_end_at_all_experts() -> None:
    truth = np.array([[True, True, True, False]])
    hits, sizes = metrics.set_hits(np.array([[0.1, 0.9, 0.8, 0.7]]), truth, (0.5, 1.0, 1.2, 9.0))
    assert sizes.tolist() == [[2, 3, 4, 4]]
    assert hits.tolist() == [[2, 2, 3, 3]]


def test_calibration_counts_by_hand() -> None:
    scores = np.array([[0.05, 0.95, 1.0, 0.1]])
    truth = np.array([[False, True, True, True]])
    counts = metrics.calibration_counts(scores, truth)
    assert counts[0].tolist() == [1, 0.05, 0]
    assert counts[1].tolist() == pytest.approx([1, 0.1, 1])
    assert counts[9].tolist() == pytest.approx([2, 1.95, 2])
    assert counts[:, 0].sum() == 4


def test_a_bootstrap_draws_sequences_not_tokens() -> None:
    # Two sequences, one all right and one all wrong: a drawn mean is 0, 1/2 or 1.
    totals, counts = np.array([[1000.0], [0.0]]), np.array([1000.0, 1000.0])
    low, high = metrics.bootstrap(totals, counts, resamples=400, seed=0)
    assert (low[0], high[0]) == (0, 1)
    # Drawn within its task, each task's mean never changes.
    low, high = metrics.bootstrap(totals, counts, resamples=50, seed=0, groups=np.array([0, 1]))
    assert (low[0], high[0]) == (0.5, 0.5)


def test_lanes_hold_each_sequence_once_and_fill_evenly() -> None:
    assert metrics.lanes([5, 9, 2, 4, 4, 1], 2) == [[0, 2, 3, 5], [1, 4]]


def test_what_the_fit_or_its_early_stop_read_is_not_scored() -> None:
    trace = random_trace(2, sequences=(10, 10, 10))
    predictor = make("popularity")
    predictor.fit(trace.select([0]), trace.select([1]))
    evaluate(predictor, trace.select([2]))
    for read in (0, 1):
        with pytest.raises(ConfigError, match="popularity has read"):
            evaluate(predictor, trace.select([read, 2]))


def test_sequences_without_a_hash_cannot_be_told_apart_and_are_refused() -> None:
    trace = random_trace(2, sequences=(10,))
    nameless = dataclasses.replace(
        trace, sequences=(dataclasses.replace(trace.sequences[0], content=""),)
    )
    with pytest.raises(ConfigError, match="content hash"):
        evaluate(make("previous-token"), nameless)


def test_batches_larger_than_the_sequences_are_left_out() -> None:
    trace = random_trace(3, sequences=(6, 6, 6))
    result = evaluate(make("previous-token"), trace, batches=(1, 3, 4)).of(1)
    assert {union.batch for union in result.unions} == {1, 3}


class Users:
    """A user's own predictor: the protocol alone, in plain Python."""

    name = "users"

    def __init__(self) -> None:
        self._last: dict[int, list[int]] = {}
        self._layer = 0

    def begin_step(self, step: int, requests: Any, token_ids: Any, tasks: Sequence[str]) -> None:
        self._layer = 0

    def observe(self, event: RoutingEvent) -> None:
        self._last[event.layer] = event.experts.ravel().tolist()
        self._layer = event.layer + 1

    def plan(self, horizon: int) -> list[Guess]:
        visits = range(self._layer, self._layer + horizon)
        return [Guess(v, e, 0.5) for v in visits for e in self._last.get(v, ())]

    def forecast(self) -> None:
        return None


def test_a_users_predictor_is_evaluated_through_the_protocol() -> None:
    trace = random_trace(4, sequences=(30,))
    ours = evaluate(make("previous-token"), trace, horizons=("token", 1, 2)).to_dict()
    theirs = evaluate(Users(), trace, horizons=("token", 1, 2)).to_dict()
    k = trace.top_k
    for mine, their in zip(ours["results"], theirs["results"], strict=True):
        assert mine["depths"][0]["n"] == k
        assert their["depths"][0]["recall"] == pytest.approx(mine["depths"][0]["recall"], abs=0.02)
        assert their["depths"][0]["recall"] > 0.2


def test_scores_that_are_no_probabilities_are_refused() -> None:
    trace = random_trace(5, sequences=(4,))
    with pytest.raises(ConfigError, match="probabilities"):
        evaluate(Fixed(np.full((4, 4, 8), 1.5)), trace)
    with pytest.raises(ConfigError, match="shape"):
        evaluate(Fixed(np.ones((4, 3, 8))), trace)


def test_an_evaluation_is_json_and_text() -> None:
    trace = random_trace(6, sequences=(12, 12))
    found = evaluate(make("previous-token"), trace, batches=(1, 2), resamples=20)
    read = json.loads(json.dumps(found.to_dict()))
    assert read["results"][0]["horizon"] == "token"
    text = found.to_text()
    assert "before layer 0 runs" in text and "1 layer ahead" in text
    assert "everything" in text and "precision" in text


@pytest.mark.parametrize("horizon", [0, -1, "layer", True, 1.0])
def test_a_horizon_of_nothing_ahead_is_refused(horizon: Any) -> None:
    trace = random_trace(7, sequences=(3,))
    with pytest.raises(ConfigError, match="horizon"):
        evaluate(make("previous-token"), trace, horizons=(horizon,))
