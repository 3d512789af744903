"""The next gate: exact where nothing is added between routers, and corrected where something is."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest

from sluice.errors import ConfigError
from sluice.predict import evaluate, make
from sluice.predict.base import Shape
from sluice.predict.training_free.next_gate import NextGate, NextGateSettings
from sluice.predict.training_free.router_weights import RouterWeights
from sluice.trace import Trace, TraceSequence

LAYERS, EXPERTS, TOP_K, WIDTH = 4, 12, 3, 24


def routers_of(seed: int = 0) -> RouterWeights:
    rng = np.random.default_rng(seed)
    plain = RouterWeights.plain(rng.normal(size=(LAYERS, EXPERTS, WIDTH)))
    return RouterWeights(
        **(
            plain.state()
            | {
                "scale": rng.uniform(0.3, 2, (LAYERS, WIDTH)).astype(np.float32),
                "bias": rng.normal(size=(LAYERS, EXPERTS)).astype(np.float32),
            }
        )
    )


def routed_trace(
    routers: RouterWeights,
    added: np.ndarray,
    *,
    noise: float = 0.0,
    seed: int = 1,
    tokens: int = 60,
) -> Trace:
    """States that change by `added[l]` before layer l, routed by the routers themselves."""
    rng = np.random.default_rng(seed)
    stream = rng.normal(size=(tokens, WIDTH))
    hidden = np.zeros((tokens, LAYERS, WIDTH), np.float16)
    routes = np.zeros((tokens, LAYERS, TOP_K), np.int16)
    for layer in range(LAYERS):
        stream = stream + added[layer] + noise * rng.normal(size=stream.shape)
        size = np.sqrt(np.square(stream).mean(-1, keepdims=True))
        hidden[:, layer] = routers.scale[layer] * stream / size
        choices = routers.choices(stream, layer)
        routes[:, layer] = np.argsort(-choices, -1)[:, :TOP_K]
    half = tokens // 2
    spans = (
        TraceSequence(0, half, content=f"{seed} a"),
        TraceSequence(half, tokens - half, content=f"{seed} b"),
    )
    return Trace(experts=routes, num_experts=EXPERTS, sequences=spans, hidden=hidden)


def bound(routers: RouterWeights) -> NextGate:
    predictor = NextGate(routers=routers)
    predictor.bind(Shape(LAYERS, EXPERTS, TOP_K))
    return predictor


@pytest.mark.parametrize("horizon", [1, 2, 3])
def test_hints_equal_the_truth_where_nothing_is_added_between_routers(horizon: int) -> None:
    routers = routers_of()
    trace = routed_trace(routers, np.zeros((LAYERS, WIDTH)))
    predictor = bound(routers)
    result = evaluate(predictor, trace, horizons=(horizon,), first_layer=horizon, batches=(1,)).of(
        horizon
    )
    assert result.depths[0].recall > 0.995  # states are kept in half precision
    assert predictor.scores(trace, horizon)[:, :horizon].max() == 0


def test_the_mean_of_what_is_added_is_calibrated() -> None:
    routers = routers_of()
    added = np.random.default_rng(2).normal(size=(LAYERS, WIDTH)) * 0.7
    plain, fitted = bound(routers), bound(routers)
    fitted.fit(routed_trace(routers, added, noise=0.2, seed=3, tokens=400))
    trace = routed_trace(routers, added, noise=0.2, seed=4, tokens=400)
    found: dict[str, Any] = {
        name: evaluate(each, trace, horizons=(1, 2, 3), first_layer=3, batches=())
        for name, each in (("plain", plain), ("fitted", fitted))
    }
    for horizon in (1, 2, 3):
        without = found["plain"].of(horizon).depths[0].recall
        with_mean = found["fitted"].of(horizon).depths[0].recall
        assert with_mean > without + 0.05, (horizon, with_mean, without)
    far = {name: each.of(3).calibration_error for name, each in found.items()}
    assert far["fitted"] < 0.03 < far["plain"], far


def test_what_a_token_adds_is_calibrated_by_its_id() -> None:
    routers = routers_of()
    meaning = np.random.default_rng(8).normal(size=(10, LAYERS, WIDTH)) * 1.5

    def trace_of(seed: int, tokens: int) -> Trace:
        ids = np.random.default_rng(seed).integers(0, 10, tokens).astype(np.int32)
        added = np.moveaxis(meaning[ids], 1, 0)  # [layers, tokens, width]
        trace = routed_trace(routers, added, noise=0.1, seed=seed, tokens=tokens)
        return dataclasses.replace(trace, token_ids=ids)

    fit, asked = trace_of(3, 400), trace_of(4, 200)
    reached: dict[str, float] = {}
    for name, most in (("by token", 2048), ("for all", 0), ("few", 3)):
        predictor = NextGate(NextGateSettings(max_tokens=most), routers)
        predictor.fit(fit)
        found = evaluate(predictor, asked, horizons=(1,), first_layer=1, batches=()).of(1)
        reached[name] = found.depths[0].recall
    assert reached["by token"] > reached["few"] > reached["for all"] + 0.02, reached
    # A token that is not known gets the mean of all, and is as sure as that deserves.
    nameless = dataclasses.replace(asked, token_ids=None)
    plain, by_token = NextGate(NextGateSettings(max_tokens=0), routers), bound(routers)
    for each in (plain, by_token):
        each.fit(fit)
    np.testing.assert_array_equal(plain.scores(nameless, 1), by_token.scores(nameless, 1))


def test_further_than_it_looks_it_gives_the_rates_of_all_tokens() -> None:
    routers = routers_of()
    trace = routed_trace(routers, np.zeros((LAYERS, WIDTH)))
    predictor = make("next-gate", {"max_layers": 1})
    assert isinstance(predictor, NextGate)
    predictor._routers = routers
    predictor.fit(trace)
    rates = (trace.experts[..., None] == np.arange(EXPERTS)).any(2).mean(0)
    for horizon in ("token", 2):
        np.testing.assert_allclose(predictor.scores(trace, horizon)[5], rates, rtol=1e-5)


def test_sigmoid_routers_add_their_correction_after_the_sigmoid() -> None:
    routers = routers_of()
    arrays = routers.state() | {
        "sigmoid": np.ones(LAYERS, np.bool_),
        "correction": np.random.default_rng(5).normal(size=(LAYERS, EXPERTS)).astype(np.float32),
    }
    hidden = np.random.default_rng(6).normal(size=(5, WIDTH))
    corrected = RouterWeights(**arrays)
    logits = hidden @ routers.gate[1].T + routers.bias[1]
    expected = 1 / (1 + np.exp(-logits)) + corrected.correction[1]
    np.testing.assert_allclose(corrected.choices_of_entering(hidden, 1), expected)


def test_without_gates_or_states_a_fit_is_refused() -> None:
    trace = routed_trace(routers_of(), np.zeros((LAYERS, WIDTH)))
    with pytest.raises(ConfigError, match="no gates"):
        make("next-gate").fit(trace)
    bare = Trace(experts=trace.experts, num_experts=EXPERTS, sequences=trace.sequences)
    with pytest.raises(ConfigError, match="without hidden states"):
        bound(routers_of()).fit(bare)
