"""Prompt predictors: the routing log, when a prediction is made anew, and what it is made of."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from predict.small_traces import random_trace
from sluice.errors import ConfigError
from sluice.predict import make
from sluice.predict.prompts import prompt_histogram
from sluice.trace import Trace, TraceSequence


def topic_trace(
    seed: int, prompts: int, *, stay: float = 0.9, tokens: int = 24, experts: int = 16
) -> Trace:
    """Prompts about topics that last a while; a token draws from its topic's experts, noisily."""
    meaning = np.random.default_rng(3).gumbel(size=(6, 3, experts)) * 1.2
    rng = np.random.default_rng(seed)
    routes = np.zeros((prompts * tokens, 3, 2), np.int16)
    topic = 0
    for prompt in range(prompts):
        if rng.random() > stay:
            topic = int(rng.integers(6))
        for row in range(prompt * tokens, (prompt + 1) * tokens):
            noisy = meaning[topic] + rng.gumbel(size=(3, experts)) * 1.5
            routes[row] = np.argsort(-noisy, -1)[:, :2]
    spans = tuple(
        TraceSequence(i * tokens, tokens, task="talk", content=f"{seed} {i}")
        for i in range(prompts)
    )
    return Trace(experts=routes, num_experts=experts, sequences=spans)


def test_the_routing_log_counts_tokens_times_k_per_layer() -> None:
    trace = random_trace(1, sequences=(17,), top_k=2)
    counts, shares = prompt_histogram(trace.experts, trace.num_experts)
    assert (counts.sum(-1) == 17 * 2).all()
    assert counts[1, 3] == (trace.experts[:, 1] == 3).sum()
    np.testing.assert_allclose(shares, counts / 34, rtol=1e-6)


@pytest.mark.parametrize(("mode", "calls"), [("A", 1), ("L", 4)])
def test_mode_a_makes_one_model_call_and_mode_l_one_a_layer(mode: str, calls: int) -> None:
    trace = random_trace(2, sequences=(12,) * 5)
    predictor: Any = make("prompt-ema", {"mode": mode})
    predictor.fit(trace)
    predicted = predictor.predict("one")
    assert predictor.model_calls == calls
    assert predicted.shape == (4, 8)
    np.testing.assert_allclose(predicted.sum(-1), 1, rtol=1e-5)
    assert predicted.min() >= 0


def run_prompts(predictor: Any, trace: Trace, upto: int) -> list[np.ndarray]:
    """Plays prompts live, a step each; what is planned while each runs."""
    plans: list[np.ndarray] = []
    for number, sequence in enumerate(trace.sequences[:upto]):
        requests = np.full(sequence.length, number)
        predictor.begin_step(number, requests, None, (sequence.task,) * sequence.length)
        plans.append(predictor.usage(sequence.task).copy())
        for layer in range(trace.num_layers):
            predictor.observe(_event(trace, sequence, layer, number, requests))
    return plans


def _event(trace: Trace, sequence: TraceSequence, layer: int, step: int, requests: Any) -> Any:
    from sluice.predict import RoutingEvent

    return RoutingEvent(
        step=step,
        layer=layer,
        experts=trace.experts[sequence.rows, layer],
        requests=requests,
        decode=False,
        tasks=(sequence.task,) * sequence.length,
    )


@pytest.mark.parametrize(("period", "prompts"), [(1, 7), (3, 3), (3, 4), (3, 7), (40, 41), (5, 1)])
def test_predictions_are_made_before_every_pth_prompt_and_at_no_other_time(
    period: int, prompts: int
) -> None:
    trace = topic_trace(1, max(prompts, 8), tokens=4)
    predictor: Any = make("prompt-ema", {"period": period})
    predictor.fit(topic_trace(2, 8, tokens=4))
    plans = run_prompts(predictor, trace, prompts)
    assert predictor.refreshes == (prompts - 1) // period
    for number in range(1, prompts):
        changed = not np.array_equal(plans[number], plans[number - 1])
        assert changed == (number % period == 0)


def test_auto_predicts_anew_once_the_overlap_has_fallen_by_a_tenth() -> None:
    steady = topic_trace(4, 30, stay=1.0)
    predictor: Any = make("prompt-ema", {"period": "auto"})
    predictor.fit(steady.select(range(10)))
    run_prompts(predictor, steady.select(range(10, 30)), 20)
    assert predictor.refreshes == 0

    # The same prompts, but from the tenth on every expert is another one.
    routes = steady.experts.copy()
    half = 20 * 24
    routes[half:] = steady.num_experts - 1 - routes[half:]
    moved = Trace(experts=routes, num_experts=16, sequences=steady.sequences)
    predictor.reset()
    plans = run_prompts(predictor, moved.select(range(10, 30)), 20)
    changes = [n for n in range(1, 20) if not np.array_equal(plans[n], plans[n - 1])]
    assert predictor.refreshes == len(changes) <= 6
    assert 11 <= changes[0] <= 13


def test_ema_by_hand_and_the_global_one_until_a_task_has_four_prompts() -> None:
    def constant(expert: int) -> np.ndarray:
        return np.full((2, 1, 1), expert, np.int16)

    def trace_of(parts: list[tuple[str, int]]) -> Trace:
        spans = tuple(
            TraceSequence(2 * i, 2, task=task, content=f"{task}{i}")
            for i, (task, _) in enumerate(parts)
        )
        routes = np.concatenate([constant(expert) for _, expert in parts])
        return Trace(experts=routes, num_experts=3, sequences=spans)

    predictor: Any = make("prompt-ema", {"period": 1})
    predictor.fit(trace_of([("a", 0)] * 3 + [("b", 1)]))  # too few of either for its own profile
    profile = np.array([0.75, 0.25, 0])
    asked = trace_of([("c", 2)] * 6)
    scores = predictor.scores(asked, "token")[::2, 0]
    together, own = profile.copy(), profile.copy()
    for prompt in range(6):
        np.testing.assert_allclose(scores[prompt], together if prompt < 4 else own, rtol=1e-5)
        together = 0.7 * together + 0.3 * np.array([0, 0, 1])
        own = 0.7 * own + 0.3 * np.array([0, 0, 1])
    # A task of its own: others' prompts move "together", not "own".
    mixed = trace_of([("c", 2)] * 4 + [("d", 1), ("c", 2)])
    scores = predictor.scores(mixed, "token")[::2, 0]
    own = profile.copy()
    for _ in range(4):
        own = 0.7 * own + 0.3 * np.array([0, 0, 1])
    np.testing.assert_allclose(scores[5], own, rtol=1e-5)


def overlap_of(planned: np.ndarray, demanded: np.ndarray, most: int) -> float:
    """Share of demanded routes that go to the `most` experts planned first."""
    top = np.argsort(-planned, axis=-1, kind="stable")[..., :most]
    return float(np.take_along_axis(demanded, top, -1).sum(-1).mean())


def test_on_sticky_topics_it_beats_random_the_last_prompt_and_popularity() -> None:
    fit, asked = topic_trace(5, 60), topic_trace(6, 120)
    predictor: Any = make("prompt-ema", {"period": 1})
    predictor.fit(fit)
    popular = make("popularity")
    popular.fit(fit)
    scores = predictor.scores(asked, "token")
    rates: Any = popular.scores(asked, "token")[0]
    rng = np.random.default_rng(0)
    reached: dict[str, list[float]] = {"ema": [], "last": [], "popular": [], "random": []}
    last = rates
    for sequence in asked.sequences:
        demanded = prompt_histogram(asked.experts[sequence.rows], 16)[1]
        for name, planned in (
            ("ema", scores[sequence.start]),
            ("last", last),
            ("popular", rates),
            ("random", rng.random(rates.shape)),
        ):
            reached[name].append(overlap_of(planned, demanded, 5))
        last = demanded
    means = {name: float(np.mean(found)) for name, found in reached.items()}
    assert means["ema"] > means["last"] > means["random"], means
    assert means["ema"] > means["popular"] > means["random"], means


@pytest.mark.parametrize(
    ("cold_start", "value"), [("ondemand", 0.0), ("all", 1.0), ("profile", None)]
)
def test_cold_starts(cold_start: str, value: float | None) -> None:
    trace = random_trace(3, sequences=(6, 6, 6, 6), tasks=("one",))
    predictor: Any = make("prompt-ema", {"cold_start": cold_start, "period": 2})
    predictor.fit(trace)
    scores = predictor.scores(random_trace(4, sequences=(5, 5, 5), tasks=("one",)), "token")
    if value is None:
        shares = np.mean(
            [prompt_histogram(trace.experts[s.rows], 8)[1] for s in trace.sequences], axis=0
        )
        np.testing.assert_allclose(scores[0], np.minimum(2 * shares, 1), rtol=1e-5)
    else:
        assert (scores[:10] == value).all()
        assert (scores[10:] != value).any()


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"period": 0}, "at least 1 prompt"),
        ({"period": "often"}, "'auto'"),
        ({"mode": "B"}, "'A' or 'L'"),
        ({"cold_start": "warm"}, "'ondemand'"),
        ({"keep": 1.0}, "below 1"),
        ({"planned_experts": -1}, "0 or more"),
    ],
)
def test_settings_that_cannot_work_are_refused(settings: dict, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        make("prompt-ema", settings)
