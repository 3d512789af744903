"""Tables by hand: what each counts, how it backs off, and what it does with the unknown."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from predict.small_traces import random_trace
from sluice.errors import ConfigError
from sluice.predict import make
from sluice.predict.training_free.decayed import DecayedCounts
from sluice.trace import Trace, TraceSequence


def trace_of(routes: list[list[list[int]]], experts: int, **more: object) -> Trace:
    """One sequence from nested lists [token][layer][rank]."""
    array = np.asarray(routes, np.int16)
    spans = (TraceSequence(0, len(array), content="by hand"),)
    return Trace(experts=array, num_experts=experts, sequences=spans, **more)  # type: ignore[arg-type]


def test_popularity_is_the_share_of_tokens() -> None:
    trace = trace_of([[[0, 1]], [[0, 2]], [[0, -1]], [[1, 2]]], 4)
    predictor = make("popularity")
    predictor.fit(trace)
    np.testing.assert_allclose(predictor.scores(trace, "token")[2, 0], [0.75, 0.5, 0.5, 0])


def test_popularity_by_task_backs_off_to_all_tasks_by_its_prior() -> None:
    trace = random_trace(1, sequences=(30, 30), tasks=("one", "two"))
    plain, own = make("popularity"), make("popularity", {"by_task": True, "prior_tokens": 10.0})
    plain.fit(trace)
    own.fit(trace)
    rates = plain.scores(trace, "token")[0]
    used = (trace.experts[:30, :, :, None] == np.arange(8)).any(2).sum(0)
    np.testing.assert_allclose(own.scores(trace, "token")[0], (used + 10 * rates) / 40, rtol=1e-5)
    unseen = dataclasses.replace(trace, sequences=(TraceSequence(0, 60, task="three"),))
    np.testing.assert_allclose(own.scores(unseen, "token")[0], rates)


def test_previous_token_ranks_reuse_first_whatever_is_popular() -> None:
    popular = [[[0, 1]], [[0, 2]], [[0, 3]], [[0, 1]], [[0, 2]], [[4, 5]], [[0, 3]]]
    trace = trace_of(popular, 6)
    predictor = make("previous-token")
    predictor.fit(trace)
    scores = predictor.scores(trace, "token")
    for row in range(1, len(popular)):
        reused = sorted(np.argsort(-scores[row, 0], kind="stable")[:2].tolist())
        assert reused == sorted(popular[row - 1][0])
    # Of 12 experts that could stay, expert 0 did four times.
    assert scores[1, 0].max() == pytest.approx(4 / 12)


def test_decayed_counts_halve_and_blend_by_hand() -> None:
    counts = DecayedCounts(1, 3, half_life=1.0)
    counts.add(np.array([[0, 1]]))
    counts.add(np.array([[1, -1]]))
    np.testing.assert_allclose(counts.counts, [[0.5, 1.5, 0]])
    assert counts.tokens == 1.5
    blended = counts.blend(np.array([[0.2, 0.2, 0.2]], np.float32), 0.5)
    np.testing.assert_allclose(blended, [[0.6 / 2, 1.6 / 2, 0.1 / 2]])


def test_lift_multiplies_odds_by_the_root_of_the_rate_against_the_usual_one() -> None:
    counts = DecayedCounts(1, 2, half_life=1e9)
    for _ in range(48):
        counts.add(np.array([[0]]))
    usual = np.array([[0.25, 0.5]], np.float32)
    lifted = counts.lift(np.array([[0.5, 0.5]], np.float32), usual)
    # Blended with 16 tokens at the usual rate: (48 + 4) / 64 = .8125 and 8 / 64 = .125.
    odds = np.sqrt(np.array([0.8125 / 0.25, 0.125 / 0.5]))
    np.testing.assert_allclose(lifted, [odds / (1 + odds)], rtol=1e-5)


def test_token_table_backs_off_by_four_and_is_exact_for_a_token_only_router() -> None:
    rng = np.random.default_rng(0)
    choice = np.argsort(rng.random((10, 3, 8)), -1)[..., :2].astype(np.int16)
    ids = rng.integers(0, 10, 600).astype(np.int32)
    trace = Trace(
        experts=choice[ids],
        num_experts=8,
        sequences=(TraceSequence(0, 600, content="fit"),),
        token_ids=ids,
    )
    predictor = make("token-table")
    predictor.fit(trace)
    scores = predictor.scores(trace, "token")
    top = np.sort(np.argsort(-scores, -1, kind="stable")[..., :2], -1)
    np.testing.assert_array_equal(top, np.sort(trace.experts, -1))

    seen = int((ids == ids[0]).sum())
    rate = float((trace.experts[:, 0] == trace.experts[0, 0, 0]).any(-1).mean())
    expected = (seen + 4 * rate) / (seen + 4)
    assert scores[0, 0, trace.experts[0, 0, 0]] == pytest.approx(expected, rel=1e-5)


def test_token_table_gives_unknown_tokens_the_rates_of_all() -> None:
    trace = random_trace(2)
    predictor = make("token-table", {"max_tokens": 3})
    predictor.fit(trace)
    assert predictor.fitting.notes == {"distinct_tokens": 12, "kept_tokens": 3}
    rates = (trace.experts[..., None] == np.arange(8)).any(2).mean(0)
    unseen = dataclasses.replace(trace, token_ids=np.full_like(trace.token_ids, 10**6))
    np.testing.assert_allclose(predictor.scores(unseen, 1)[0], rates, rtol=1e-5)
    unknown = dataclasses.replace(trace, token_ids=None)
    np.testing.assert_allclose(predictor.scores(unknown, 1)[0], rates, rtol=1e-5)
    with pytest.raises(ConfigError, match="without token ids"):
        make("token-table").fit(unknown)


def markov_trace(seed: int, tokens: int) -> tuple[Trace, np.ndarray]:
    """Top 1 of 4 in 3 layers; layer 2 is drawn from P(e | layer 0, layer 1)."""
    table = np.random.default_rng(7).dirichlet([0.5] * 4, (4, 4))
    rng = np.random.default_rng(seed)
    first, second = rng.integers(0, 4, (2, tokens))
    thresholds = np.cumsum(table[first, second], axis=-1)
    third = np.minimum((rng.random((tokens, 1)) > thresholds).sum(-1), 3)
    routes = np.stack([first, second, third], axis=1)[..., None].astype(np.int16)
    spans = (TraceSequence(0, tokens, content=f"markov {seed}"),)
    return Trace(experts=routes, num_experts=4, sequences=spans), table


def test_path_table_is_within_two_percent_of_a_markov_traces_truth() -> None:
    trace, table = markov_trace(1, 60_000)
    predictor = make("path-table")
    predictor.fit(trace)
    other, _ = markov_trace(2, 2_000)
    truth = table[other.experts[:, 0, 0], other.experts[:, 1, 0]]
    assert np.abs(predictor.scores(other, 1)[:, 2] - truth).max() < 0.02


def test_path_table_keys_are_order_free() -> None:
    trace = random_trace(3, sequences=(60, 60))
    predictor = make("path-table")
    predictor.fit(trace)
    flipped = dataclasses.replace(
        trace, experts=trace.experts[..., ::-1].copy(), weights=None, token_ids=None
    )
    for horizon in (1, 2, "token"):
        np.testing.assert_array_equal(
            predictor.scores(trace, horizon), predictor.scores(flipped, horizon)
        )
    again = make("path-table")
    again.fit(flipped)
    np.testing.assert_array_equal(again.scores(trace, 1), predictor.scores(trace, 1))


def test_path_table_backs_off_from_two_layers_to_one_to_the_rates() -> None:
    # Layers 0, 1, 2 of four tokens, top 1 of 4.
    routes = [[[0], [1], [2]], [[0], [1], [2]], [[0], [1], [3]], [[3], [1], [3]]]
    predictor = make("path-table", {"back_off": 4.0})
    predictor.fit(trace_of(routes, 4))
    rate = np.array([0, 0, 0.5, 0.5])
    last = (np.array([0, 0, 2, 2]) + 4 * rate) / (4 + 4)  # key (1): all four tokens
    both = (np.array([0, 0, 2, 1]) + 4 * last) / (3 + 4)  # key (0, 1): three of them
    asked = trace_of([[[0], [1], [0]], [[2], [1], [0]], [[2], [2], [0]]], 4)
    scores = predictor.scores(asked, 1)[:, 2]
    np.testing.assert_allclose(scores[0], both, rtol=1e-6)
    np.testing.assert_allclose(scores[1], last, rtol=1e-6)
    np.testing.assert_allclose(scores[2], rate, rtol=1e-6)


def test_path_tables_first_layers_read_the_last_layers_of_the_token_before() -> None:
    # Layer 0 repeats what layer 2 of the token before chose; layers 1 and 2 are constant or drawn.
    rng = np.random.default_rng(5)
    last = rng.integers(0, 4, 400)
    first = np.concatenate([[0], last[:-1]])
    routes = np.stack([first, np.zeros_like(last), last], axis=1)[..., None]
    trace = trace_of(routes.tolist(), 4)
    for keys in ("sets", "pairs"):
        predictor = make("path-table", {"keys": keys})
        predictor.fit(trace)
        top = predictor.scores(trace, "token")[1:, 0].argmax(-1)
        np.testing.assert_array_equal(top, first[1:])


def test_path_table_drops_the_rarest_keys() -> None:
    routes = [[[0], [1]]] * 5 + [[[1], [2]]] * 3 + [[[2], [3]]]
    predictor = make("path-table", {"max_keys": 2})
    predictor.fit(trace_of(routes, 4))
    assert predictor.fitting.notes == {"keys": "sets", "one_layer": 2, "two_layers": 2}
    rates = np.array([0, 5, 3, 1]) / 9
    kept, dropped = trace_of([[[0], [0]]], 4), trace_of([[[2], [0]]], 4)
    np.testing.assert_allclose(predictor.scores(dropped, 1)[0, 1], rates, rtol=1e-6)
    assert predictor.scores(kept, 1)[0, 1, 1] > rates[1]


def test_pairs_are_the_mean_over_active_experts_from_32_experts_on() -> None:
    trace = random_trace(4, sequences=(50, 50), experts=32, top_k=3)
    predictor = make("path-table")
    predictor.fit(trace)
    assert predictor.fitting.notes == {"keys": "pairs"}
    used = (trace.experts[..., None] == np.arange(32)).any(2).astype(float)
    layer = 2
    times = used[:, layer - 1].sum(0)
    rates = used[:, layer].mean(0)
    given = (used[:, layer - 1].T @ used[:, layer] + 4 * rates) / (times[:, None] + 4)
    expected = given[trace.experts[17, layer - 1]].mean(0)
    np.testing.assert_allclose(predictor.scores(trace, 1)[17, layer], expected, rtol=1e-5)


def test_two_layers_ahead_the_tables_own_answer_votes() -> None:
    trace = random_trace(4, sequences=(80, 80), experts=32, top_k=3)
    predictor = make("path-table")
    predictor.fit(trace)
    near = predictor.scores(trace, 1)[:, 1]
    pairs, rates = predictor.state()["pairs"][2], predictor.state()["rates"][2]
    expected = near @ pairs / near.sum(-1, keepdims=True)
    np.testing.assert_allclose(predictor.scores(trace, 2)[:, 2], expected, rtol=1e-4)
    assert np.abs(expected - rates).max() > 0.01


@pytest.mark.parametrize(
    ("name", "settings", "says"),
    [
        ("path-table", {"keys": "triples"}, "'sets' or 'pairs'"),
        ("path-table", {"back_off": 0}, "more than 0"),
        ("token-table", {"max_token": 3}, "did you mean 'max_tokens'"),
        ("decayed-frequency", {"half_life": -1}, "half_life"),
    ],
)
def test_settings_that_cannot_work_are_refused(name: str, settings: dict, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        make(name, settings)
