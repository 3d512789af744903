"""Guesses inside of forwards: the core's scorers say what the predictors say."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from hf import tiny

import sluice
from sluice import _core
from sluice.errors import ConfigError
from sluice.foresight import Foresight
from sluice.lookahead import Lookahead
from sluice.predict.networks.forecaster import Forecaster, ForecasterSettings
from sluice.predict.protocol import RoutingEvent
from sluice.predict.training_free.next_gate import NextGate
from sluice.predict.training_free.path_table import PathTable, PathTableSettings
from sluice.trace import Trace

PROMPT = tiny.PROMPT[:1]
LEAST = 0.2  # what the scorers leave out


@pytest.fixture(scope="module")
def recorded() -> Trace:
    model = tiny.build("mixtral")
    with (
        sluice.offload(model, device_memory="25%") as session,
        session.record(hidden=True, token_ids=True) as recorder,
    ):
        for shift in range(4):
            tiny.greedy(model, PROMPT + shift)
    return recorder.trace()


def fitted(kind: str, model: Any, trace: Trace) -> Any:
    made = (
        PathTable(PathTableSettings(keys="pairs"))
        if kind == "pairs"
        else NextGate.from_model(model, top_k=2)
    )
    made.fit(trace)
    return made


def layer_of(
    scorer: _core.Scorer, layer: int, experts: Any, weights: Any = None, hidden: Any = None
) -> tuple[int, Any, list[tuple[int, int, float, int]]]:
    """What a scorer says of one call; experts `[T, K]`."""
    ids = np.asarray(experts, np.int64)
    ones = np.ones(ids.shape, np.float32) if weights is None else np.asarray(weights, np.float32)
    states = np.zeros(0, np.float32) if hidden is None else np.asarray(hidden, np.float32)
    return scorer.layer(layer, ids, ones, states)


@pytest.mark.parametrize("kind", ["pairs", "gates"])
def test_the_core_says_what_the_predictor_says(kind: str, recorded: Trace) -> None:
    predictor = fitted(kind, tiny.build("mixtral"), recorded)
    found_kind, tables = predictor.core_tables()
    assert found_kind == kind
    assert recorded.hidden is not None and recorded.token_ids is not None
    scorer = _core.Scorer(kind, tables)
    compared = 0
    for ahead in (1,) if kind == "pairs" else (1, 2):
        scores = predictor.scores(recorded, ahead)
        for row in range(recorded.num_tokens):
            own = recorded.token_ids[row : row + 1].astype(np.int64)
            scorer.begin_step(np.zeros(1, np.int64), 1, own)
            for layer in range(recorded.num_layers - ahead):
                hidden = recorded.hidden[row, layer][None] if kind == "gates" else None
                _, kept_scores, guesses = layer_of(
                    scorer, layer, recorded.experts[row, layer][None], hidden=hidden
                )
                assert not kept_scores.size
                expected = scores[row, layer + ahead]
                got = np.zeros_like(expected)
                for to, expert, probability, layers_ahead in guesses:
                    if layers_ahead == ahead:
                        assert to == layer + ahead
                        got[expert] = probability
                near = np.abs(expected - LEAST) < 1e-3
                kept = np.where(expected >= LEAST, expected, 0)
                assert np.allclose(got[~near], kept[~near], atol=2e-4), (row, layer)
                compared += int((kept > 0).sum())
    assert compared > 100


def test_tokens_of_one_id_have_a_mean_step_of_their_own(recorded: Trace) -> None:
    _, tables = fitted("gates", tiny.build("mixtral"), recorded).core_tables()
    assert recorded.hidden is not None and recorded.token_ids is not None
    known = np.flatnonzero(np.isin(recorded.token_ids, tables["ids"]))[0]
    scorer = _core.Scorer("gates", tables)

    def guesses(token_id: int) -> Any:
        assert recorded.hidden is not None
        scorer.begin_step(np.zeros(1, np.int64), 1, np.array([token_id]))
        experts, hidden = recorded.experts[known, 0], recorded.hidden[known, 0]
        return layer_of(scorer, 0, experts[None], hidden=hidden[None])[2]

    assert guesses(int(recorded.token_ids[known])) != guesses(10**6)


def test_a_batch_is_joined_by_noisy_or(recorded: Trace) -> None:
    scorer = _core.Scorer(*fitted("pairs", None, recorded).core_tables())

    def of(ids: np.ndarray) -> np.ndarray:
        found = np.zeros(tiny.NUM_EXPERTS)
        for _, expert, probability, _ in layer_of(scorer, 0, ids)[2]:
            found[expert] = probability
        return found

    a, b = recorded.experts[3, :1], recorded.experts[9, :1]
    one, other, both = of(a), of(b), of(np.concatenate([a, b]))
    known = (one > 0) & (other > 0)
    assert known.any()
    assert np.allclose(both[known], 1 - (1 - one[known]) * (1 - other[known]), atol=1e-5)
    many = np.repeat(a, 9, axis=0)
    assert not of(many).any(), "a larger batch needs nearly everybody"


@pytest.mark.parametrize("kind", ["pairs", "gates", "forecast"])
def test_tokens_are_the_same_and_guesses_come_true(kind: str, recorded: Trace) -> None:
    model = tiny.build("mixtral")
    expected = tiny.greedy(model, PROMPT)
    policy = "forecast:always" if kind == "forecast" else "decayed-lfu"
    with sluice.offload(model, device_memory="60%", policy=policy) as session:
        running = session.predict(
            forecaster(recorded) if kind == "forecast" else fitted(kind, model, recorded)
        )
        assert isinstance(running, Lookahead)
        assert torch.equal(tiny.greedy(model, PROMPT), expected)
        session.drain()
        told = session.stats()
        assert told.hints > 0
        assert told.read_by_reason["hint used"] > 0
        running.close()
        assert torch.equal(tiny.greedy(model, PROMPT), expected)
        assert session.stats().hints == told.hints


def forecaster(trace: Trace) -> Forecaster:
    made = Forecaster(
        ForecasterSettings(
            epochs=1, hidden=12, units=4, memory_tokens=20, recent_tokens=7, running=9.0
        )
    )
    made.fit(trace)
    made.capacity = 3
    head = made._head  # pyright: ignore[reportPrivateUsage]
    assert head is not None
    with torch.no_grad():
        # After one pass it is sure of nobody, and would guess nobody.
        head.out_bias += torch.randn(head.out_bias.shape, generator=torch.manual_seed(5)) + 1
    return made


@dataclass
class Twins:
    """The forecaster in Python and the core's, shown the same forwards."""

    python: Forecaster
    core: _core.Scorer
    trace: Trace
    step: int = 0
    scores: int = 0
    guesses: int = 0

    def forward(self, requests: list[int], tokens: int, rows: list[int]) -> None:
        """A forward of rows of the trace, in order of requests and tokens."""
        trace = self.trace
        shown = min(tokens, self.python.prompt_tokens)
        owners = np.repeat(np.array(requests), shown)
        newest = np.reshape(rows, (-1, tokens))[:, -shown:].ravel()
        self.step += 1
        self.python.begin_step(self.step, owners, None, ())
        self.core.begin_step(np.array(requests), tokens, np.zeros(0, np.int64))
        assert trace.weights is not None
        told = np.zeros((trace.num_layers, trace.num_experts))
        for layer in range(trace.num_layers):
            experts, weights = trace.experts[rows, layer], trace.weights[rows, layer]
            self.python.observe(
                RoutingEvent(
                    step=self.step,
                    layer=layer,
                    experts=trace.experts[newest, layer],
                    weights=trace.weights[newest, layer],
                    requests=owners,
                )
            )
            first, kept, guesses = layer_of(self.core, layer, experts, weights)
            last = layer + 1 == trace.num_layers
            if tokens > 1 and not last:
                assert not kept.size and not guesses
                continue
            expected = self.python.forecast()
            assert expected is not None
            if tokens > 1:  # Python says it of the newest request alone
                assert first == 0 and kept.shape == expected.shape and not guesses
                if len(requests) == 1:
                    assert np.allclose(kept, expected, atol=2e-5), self.step
                continue
            assert first == layer
            assert np.allclose(kept[0], expected[layer], atol=2e-5), (self.step, layer)
            self.scores += kept.size
            for to, expert, probability, ahead in guesses:
                assert (to, ahead) == (layer, trace.num_layers)
                told[layer, expert] = probability
        if tokens == 1:
            coming = self.python.upcoming(trace.num_layers)
            near = np.abs(coming - 0.5) < 1e-4
            assert np.allclose(told[~near], np.where(coming >= 0.5, coming, 0)[~near], atol=2e-5)
            self.guesses += int((told > 0).sum())


def test_the_core_forecasts_what_the_forecaster_does(recorded: Trace) -> None:
    predictor = forecaster(recorded)
    kind, tables = predictor.core_tables() or ("", {})
    assert kind == "forecast"
    twins = Twins(predictor, _core.Scorer(kind, tables), recorded)
    rows = iter(np.random.default_rng(3).permutation(np.tile(np.arange(40), 8)).tolist())

    def some(count: int) -> list[int]:
        return [next(rows) for _ in range(count)]

    twins.forward([0], 5, some(5))  # a prompt
    for _ in range(25):  # beyond the window of futures, and once around the ring
        twins.forward([0], 1, some(1))
    twins.forward([1], 1, some(1))  # goes on where the other text ended
    twins.forward([2, 3], 2, some(4))
    for _ in range(12):
        twins.forward([2, 3], 1, some(2))
    twins.forward([0, 2], 1, some(2))  # one comes back, one leaves
    twins.forward([4], 21, some(21))  # a prompt of which the newest are read
    for _ in range(20):
        twins.forward([4], 1, some(1))
    assert twins.scores > 1400
    assert 50 < twins.guesses < twins.scores / 2


def test_layers_of_somebody_else_end_a_token_without_harm(recorded: Trace) -> None:
    predictor = forecaster(recorded)
    scorer = _core.Scorer(*(predictor.core_tables() or ("", {})))
    none = np.zeros(0, np.int64)
    row = recorded.experts[0]
    assert not layer_of(scorer, 0, row[0][None])[1].size, "no step has begun"
    scorer.begin_step(np.array([0]), 1, none)
    assert layer_of(scorer, 0, row[0][None])[1].size
    assert not layer_of(scorer, 2, row[2][None])[1].size, "layer 1 was left out"
    assert not layer_of(scorer, 1, row[1][None])[1].size
    scorer.begin_step(np.array([0]), 1, none)
    assert not layer_of(scorer, 0, recorded.experts[:2, 0])[1].size, "of more rows than the step"
    scorer.begin_step(np.arange(9), 1, none)
    assert not layer_of(scorer, 0, recorded.experts[:9, 0])[1].size, "a large batch"
    scorer.begin_step(np.array([0]), 1, none)
    wild = np.array([[-1, 10**6]])
    first, kept, _ = layer_of(scorer, 0, wild)
    assert first == 0 and np.isfinite(kept).all()
    for request in range(40):
        scorer.begin_step(np.array([request]), 1, none)
        for layer in range(recorded.num_layers):
            assert np.isfinite(layer_of(scorer, layer, row[layer][None])[1]).all()


@pytest.mark.parametrize("damage", ["prefix", "out", "memory.routes", "context", "missing"])
def test_a_forecaster_that_does_not_fit_is_refused(damage: str, recorded: Trace) -> None:
    kind, tables = forecaster(recorded).core_tables() or ("", {})
    if damage == "missing":
        del tables["window"]
        message = "window: missing"
    elif damage == "context":
        tables["context"] = np.array([3, 99], np.int32)
        message = "got feature 99 as context"
    else:
        tables[damage] = tables[damage][:1]
        message = "values of " + damage.removeprefix("memory.")
    with pytest.raises(ConfigError, match=message):
        _core.Scorer(kind, tables)


def test_one_that_follows_the_running_sequence_is_no_table(recorded: Trace) -> None:
    adapting = PathTable(PathTableSettings(keys="pairs", adapt=True))
    adapting.fit(recorded)
    assert adapting.core_tables() is None
    model = tiny.build("mixtral")
    with sluice.offload(model, device_memory="25%") as session:
        assert isinstance(session.predict(adapting), Foresight)


def test_beside_plec_a_predictor_plans_on_the_thread(recorded: Trace) -> None:
    predictor = PathTable(PathTableSettings(keys="pairs"))
    predictor.fit(recorded)
    assert predictor.core_tables() is not None
    model = tiny.build("mixtral")
    with sluice.offload(model, device_memory="25%", policy="plec") as session:
        assert isinstance(session.predict(predictor), Foresight)


def test_tables_of_another_model_are_refused(recorded: Trace) -> None:
    kind, tables = fitted("pairs", None, recorded).core_tables()
    model = tiny.build("mixtral")
    with sluice.offload(model, device_memory="25%") as session:
        for changed, message in (
            ({"num_layers": 2}, "got 192 values of pairs, expected 128"),
            ({"num_layers": 2, "pairs": tables["pairs"][:2]}, "scorer: got one for 2 layers of 8"),
        ):
            with pytest.raises(ConfigError, match=message):
                session.add_scorer(kind, {**tables, **changed})
        with pytest.raises(ConfigError, match="pairs: missing"):
            session.add_scorer(kind, {"num_layers": 3, "num_experts": tiny.NUM_EXPERTS})
        with pytest.raises(ConfigError, match='expected "pairs", "gates" or "forecast"'):
            session.add_scorer("crystal-ball", tables)
        tiny.greedy(model, PROMPT)
