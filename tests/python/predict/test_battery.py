"""What every predictor keeps: it reads nothing of the future, and both of its paths agree."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from predict.battery import CASES, fitted, unfitted
from predict.small_traces import with_future_changed
from sluice.predict import Predictor, RoutingEvent, load, save
from sluice.predict.offline import drive, drive_keep_scores

HORIZONS = ("token", 1, 2, 3, 9)

each_case = pytest.mark.parametrize("case", CASES)


@each_case
@pytest.mark.parametrize("horizon", HORIZONS)
def test_the_future_never_changes_a_score(case: str, horizon: Any) -> None:
    predictor, trace_of = fitted(case)
    trace = trace_of(2)
    before = predictor.scores(trace, horizon)
    rng = np.random.default_rng(3)
    for seed in range(12):
        row = int(rng.integers(trace.num_tokens))
        layer = int(rng.integers(trace.num_layers))
        known = 0 if horizon == "token" else max(0, layer - horizon + 1)
        other = with_future_changed(trace, row, known, row + 1, seed)
        after = predictor.scores(other, horizon)
        np.testing.assert_array_equal(before[: row + 1, layer], after[: row + 1, layer])


@each_case
def test_a_keep_score_reads_its_own_layer_and_nothing_later(case: str) -> None:
    predictor, trace_of = fitted(case)
    trace = trace_of(2)
    before = predictor.keep_scores(trace)
    if before is None:
        return
    rng = np.random.default_rng(4)
    for seed in range(6):
        row = int(rng.integers(trace.num_tokens))
        layer = int(rng.integers(trace.num_layers))
        after = predictor.keep_scores(with_future_changed(trace, row, layer + 1, row + 1, seed))
        np.testing.assert_array_equal(before[:row], after[:row])
        np.testing.assert_array_equal(before[row, : layer + 1], after[row, : layer + 1])


@each_case
@pytest.mark.parametrize("horizon", HORIZONS)
def test_offline_scores_are_those_of_the_live_protocol(case: str, horizon: Any) -> None:
    predictor, trace_of = fitted(case)
    trace = trace_of(5)
    scores = predictor.scores(trace, horizon)
    assert scores.dtype == np.float32
    assert scores.shape == (*trace.experts.shape[:2], trace.num_experts)
    assert scores.min() >= 0 and scores.max() <= 1
    np.testing.assert_allclose(scores, drive(predictor, trace, horizon), atol=2e-6)


@each_case
def test_keep_scores_are_those_of_the_live_protocol(case: str) -> None:
    predictor, trace_of = fitted(case)
    trace = trace_of(5)
    kept, driven = predictor.keep_scores(trace), drive_keep_scores(predictor, trace)
    assert (kept is None) == (driven is None)
    if kept is not None:
        np.testing.assert_allclose(kept, driven, atol=2e-6)


@each_case
def test_sequences_apart_do_not_see_each_other(case: str) -> None:
    predictor, trace_of = fitted(case)
    if not predictor.sequences_apart:
        return
    trace = trace_of(6)
    alone = [predictor.scores(trace.select([i]), 1) for i in range(len(trace.sequences))]
    np.testing.assert_allclose(predictor.scores(trace, 1), np.concatenate(alone), atol=2e-6)


@each_case
def test_plan_lists_what_upcoming_holds_best_first(case: str) -> None:
    predictor, trace_of = fitted(case)
    trace = trace_of(7, sequences=(6,))
    predictor.reset()
    layers = trace.num_layers
    for row in range(3):
        predictor.begin_step(row, np.array([0]), trace.token_ids[row : row + 1], ("one",))
        for layer in range(layers):
            predictor.observe(event_of(trace, row, layer))
            guesses, dense = predictor.plan(layers), predictor.upcoming(layers)
            listed = np.zeros_like(dense)
            for guess in guesses:
                visit = guess.steps_ahead * layers + guess.layer - layer - 1
                listed[visit, guess.expert] = guess.probability
                assert 0 < guess.probability <= 1
            np.testing.assert_allclose(listed[listed > 0], dense[listed > 0])


@each_case
def test_a_prompt_at_once_teaches_what_its_tokens_teach_one_by_one(case: str) -> None:
    predictor, trace_of = fitted(case)
    trace = trace_of(8, sequences=(7,))
    prompt = 6
    requests = np.zeros(prompt, np.int64)

    predictor.reset()
    predictor.begin_step(0, requests, trace.token_ids[:prompt], ("one",) * prompt)
    for layer in range(trace.num_layers):
        predictor.observe(event_of(trace, slice(0, prompt), layer, decode=False))
    predictor.begin_step(1, np.array([0]), trace.token_ids[prompt:], ("one",))
    at_once = predictor.upcoming(trace.num_layers)

    predictor.reset()
    for row in range(prompt):
        predictor.begin_step(row, np.array([0]), trace.token_ids[row : row + 1], ("one",))
        for layer in range(trace.num_layers):
            predictor.observe(event_of(trace, row, layer))
    predictor.begin_step(prompt, np.array([0]), trace.token_ids[prompt:], ("one",))
    np.testing.assert_allclose(at_once, predictor.upcoming(trace.num_layers), atol=2e-6)


@each_case
def test_a_step_that_did_not_end_leaves_nothing_behind(case: str) -> None:
    predictor, trace_of = fitted(case)
    trace = trace_of(11, sequences=(6,))
    layers = trace.num_layers

    def plans(step: int, row: int, until: int) -> list[Any]:
        predictor.begin_step(step, np.array([0]), trace.token_ids[row : row + 1], ("one",))
        found = [predictor.upcoming(layers)]
        for layer in range(until):
            predictor.observe(event_of(trace, row, layer))
            found.append(predictor.upcoming(layers))
        return found

    predictor.reset()
    for row in range(3):
        plans(row, row, layers)
    some = min(2, layers - 1)
    expected = plans(3, 3, some)
    predictor.reset()
    for row in range(3):
        plans(row, row, layers)
    plans(3, 5, some)
    np.testing.assert_allclose(plans(4, 3, some), expected, atol=2e-6)


@each_case
def test_a_batch_is_joined_by_noisy_or(case: str) -> None:
    predictor, trace_of = fitted(case)
    trace = trace_of(9, sequences=(5, 5), tasks=("one", "one"))
    if not predictor.sequences_apart:
        return
    single = predictor.scores(trace, "token")
    predictor.reset()
    for step in range(4):
        rows = np.array([step, 5 + step])
        predictor.begin_step(step, np.array([0, 1]), trace.token_ids[rows], ("one", "one"))
        joined = 1 - (1 - single[rows[0]]) * (1 - single[rows[1]])
        np.testing.assert_allclose(predictor.upcoming(trace.num_layers), joined, atol=2e-6)
        for layer in range(trace.num_layers):
            predictor.observe(event_of(trace, rows, layer, requests=np.array([0, 1])))


@each_case
def test_what_was_saved_scores_the_same(case: str, tmp_path: Path) -> None:
    predictor, trace_of = fitted(case)
    trace = trace_of(10)
    folder = save(predictor, tmp_path / "saved")
    again = load(folder, "model-a")
    assert type(again) is type(predictor) and again.settings == predictor.settings
    assert again.fitting == predictor.fitting and len(again.fitting.read) == 4
    for horizon in ("token", 1):
        np.testing.assert_array_equal(
            predictor.scores(trace, horizon), again.scores(trace, horizon)
        )


@each_case
def test_same_seed_and_trace_same_predictor(case: str) -> None:
    first, _ = fitted(case)
    second, _ = fitted(case)
    assert_same_state(first.state(), second.state())


@each_case
def test_fitting_again_starts_from_nothing(case: str) -> None:
    predictor, trace_of = fitted(case)
    fresh, _ = unfitted(case)
    other = trace_of(11, sequences=(20, 20))
    predictor.fit(other)
    fresh.fit(other)
    assert_same_state(predictor.state(), fresh.state())


@each_case
def test_it_satisfies_the_protocol_and_never_raises_for_what_it_has_not_seen(case: str) -> None:
    predictor, trace_of = fitted(case)
    assert isinstance(predictor, Predictor)
    trace = trace_of(12, sequences=(3,))
    fresh, _ = unfitted(case)
    assert fresh.plan(3) == []
    for each in (predictor, fresh):
        each.reset()
        each.plan(trace.num_layers)  # before any step
        each.observe(event_of(trace, 0, 0))  # no begin_step told of it
        each.plan(trace.num_layers)
        each.begin_step(1, np.array([5]), None, ())  # no ids, no task
        each.plan(2 * trace.num_layers)
        each.begin_step(2, np.array([5]), np.array([10**6]), ("new",))
        each.plan(trace.num_layers)
        each.forecast()


def event_of(
    trace: Any, rows: Any, layer: int, *, requests: Any = None, decode: bool = True
) -> RoutingEvent:
    picked = np.atleast_1d(np.arange(trace.num_tokens)[rows])
    return RoutingEvent(
        step=int(picked[0]),
        layer=layer,
        experts=trace.experts[picked, layer],
        weights=trace.weights[picked, layer],
        requests=np.zeros(len(picked), np.int64) if requests is None else requests,
        decode=decode,
        token_ids=trace.token_ids[picked],
        hidden=None if trace.hidden is None else trace.hidden[picked, layer].astype(np.float32),
        tasks=("one",) * len(picked),
    )


def assert_same_state(first: Mapping[str, Any], second: Mapping[str, Any]) -> None:
    assert first.keys() == second.keys() and first, json.dumps([*first])
    for name in first:
        np.testing.assert_array_equal(first[name], second[name])
