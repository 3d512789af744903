"""Guesses inside of forwards: the core's scorers say what the predictors say."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hf import tiny

import sluice
from sluice import _core
from sluice.errors import ConfigError
from sluice.foresight import Foresight, Lookahead
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
        session.record(hidden=True) as recorder,
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


@pytest.mark.parametrize("kind", ["pairs", "gates"])
def test_the_core_says_what_the_predictor_says(kind: str, recorded: Trace) -> None:
    predictor = fitted(kind, tiny.build("mixtral"), recorded)
    found_kind, tables = predictor.core_tables()
    assert found_kind == kind
    assert recorded.hidden is not None
    compared = 0
    for ahead in (1,) if kind == "pairs" else (1, 2):
        scores = predictor.scores(recorded, ahead)
        for row in range(recorded.num_tokens):
            for layer in range(recorded.num_layers - ahead):
                guesses = _core.guesses_of(
                    kind,
                    tables,
                    layer,
                    recorded.experts[row, layer][None].astype(np.int64),
                    recorded.hidden[row, layer][None].astype(np.float32)
                    if kind == "gates"
                    else np.zeros(0, np.float32),
                )
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


def test_a_batch_is_joined_by_noisy_or(recorded: Trace) -> None:
    kind, tables = fitted("pairs", None, recorded).core_tables()

    def of(ids: np.ndarray) -> np.ndarray:
        found = np.zeros(tiny.NUM_EXPERTS)
        for _, expert, probability, _ in _core.guesses_of(
            kind, tables, 0, ids.astype(np.int64), np.zeros(0, np.float32)
        ):
            found[expert] = probability
        return found

    a, b = recorded.experts[3, :1], recorded.experts[9, :1]
    one, other, both = of(a), of(b), of(np.concatenate([a, b]))
    known = (one > 0) & (other > 0)
    assert known.any()
    assert np.allclose(both[known], 1 - (1 - one[known]) * (1 - other[known]), atol=1e-5)
    many = np.repeat(a, 9, axis=0)
    assert not of(many).any(), "a larger batch needs nearly everybody"


@pytest.mark.parametrize("kind", ["pairs", "gates"])
def test_tokens_are_the_same_and_guesses_come_true(kind: str, recorded: Trace) -> None:
    model = tiny.build("mixtral")
    expected = tiny.greedy(model, PROMPT)
    with sluice.offload(model, device_memory="60%") as session:
        running = session.predict(fitted(kind, model, recorded))
        assert isinstance(running, Lookahead)
        assert torch.equal(tiny.greedy(model, PROMPT), expected)
        session.drain()
        told = session.stats()
        assert told.hints > 0
        assert told.read_by_reason["hint used"] > 0
        running.close()
        assert torch.equal(tiny.greedy(model, PROMPT), expected)
        assert session.stats().hints == told.hints


def test_one_that_follows_the_running_sequence_is_no_table(recorded: Trace) -> None:
    adapting = PathTable(PathTableSettings(keys="pairs", adapt=True))
    adapting.fit(recorded)
    assert adapting.core_tables() is None
    model = tiny.build("mixtral")
    with sluice.offload(model, device_memory="25%") as session:
        assert isinstance(session.predict(adapting), Foresight)


def test_tables_of_another_model_are_refused(recorded: Trace) -> None:
    kind, tables = fitted("pairs", None, recorded).core_tables()
    model = tiny.build("mixtral")
    with sluice.offload(model, device_memory="25%") as session:
        for changed, message in (
            ({"num_layers": 2}, "got 192 values of pairs, expected 128"),
            ({"num_layers": 2, "pairs": tables["pairs"][:2]}, "scorer: got one for 2 layers of 8"),
        ):
            with pytest.raises(ConfigError, match=message):
                session.set_scorer(kind, {**tables, **changed})
        with pytest.raises(ConfigError, match="pairs: missing"):
            session.set_scorer(kind, {"num_layers": 3, "num_experts": tiny.NUM_EXPERTS})
        with pytest.raises(ConfigError, match='expected "pairs" or "gates"'):
            session.set_scorer("crystal-ball", tables)
        tiny.greedy(model, PROMPT)
