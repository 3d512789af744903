"""A predictor beside a model: shown everything, believed by nobody's tokens."""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hf import tiny

import sluice
from sluice.config import OffloadOptions
from sluice.errors import ConfigError
from sluice.foresight import _Pace
from sluice.predict import Guess, RoutingEvent

PROMPT = tiny.PROMPT[:1]
LAYERS = 3


class Notes:
    """A user's own predictor, written in a notebook: notes what it is shown, guesses at random."""

    name = "notes"

    def __init__(self) -> None:
        self.steps: list[int] = []
        self.events: list[RoutingEvent] = []
        self.plans = 0
        self.threads: set[int] = set()
        self.rng = np.random.default_rng(0)

    def begin_step(self, step: int, requests: Any, token_ids: Any, tasks: Sequence[str]) -> None:
        self.steps.append(step)
        self.threads.add(threading.get_ident())

    def observe(self, event: RoutingEvent) -> None:
        self.events.append(event)

    def plan(self, horizon: int) -> list[Guess]:
        self.plans += 1
        experts = self.rng.integers(0, tiny.NUM_EXPERTS, 4)
        return [Guess(layer, int(e), 0.9, 0) for layer in range(horizon) for e in experts[:2]]

    def forecast(self) -> Any:
        return self.rng.random((LAYERS, tiny.NUM_EXPERTS)).astype(np.float32)


class Failing(Notes):
    name = "failing"

    def plan(self, horizon: int) -> list[Guess]:
        raise RuntimeError("no idea")


class Silent(Notes):
    name = "silent"

    def plan(self, horizon: int) -> list[Guess]:
        return []

    def forecast(self) -> None:
        return None


def generated(predictor: Any, **options: Any) -> tuple[torch.Tensor, sluice.Stats]:
    model = tiny.build("mixtral")
    with sluice.offload(model, device_memory="25%", predictor=predictor, **options) as session:
        tokens = tiny.greedy(model, PROMPT)
        return tokens, session.stats()


@pytest.mark.parametrize("policy", ["auto", "plec", "edge", "lru"])
def test_tokens_do_not_depend_on_a_predictor(policy: str) -> None:
    expected, _ = generated(None)
    for predictor in (Notes(), Silent(), "decayed-frequency"):
        tokens, stats = generated(predictor, policy=policy)
        assert torch.equal(tokens, expected), predictor
        assert "predictor_failed" not in stats.degradations


def test_a_predictor_is_shown_every_step_in_order_and_on_one_thread() -> None:
    notes = Notes()
    model = tiny.build("mixtral")
    with sluice.offload(model, device_memory="25%", predictor=notes) as session:
        with session.record() as recorder:
            tiny.greedy(model, PROMPT)
            tiny.greedy(model, PROMPT)
        recorded = recorder.trace()
        assert threading.get_ident() not in notes.threads and len(notes.threads) == 1
    assert not any(t.name == "sluice-foresight" for t in threading.enumerate())
    assert notes.plans > 0
    # The last step is shown when another one begins; here none does.
    steps = [event.step for event in notes.events]
    assert steps == sorted(steps)
    assert [event.layer for event in notes.events] == list(range(LAYERS)) * (len(steps) // LAYERS)
    shown = np.concatenate([e.experts for e in notes.events if e.layer == 0])
    truth = recorded.experts[:, 0]
    assert len(truth) - 1 <= len(shown) <= len(truth)
    assert np.array_equal(np.sort(shown, axis=1), np.sort(truth[: len(shown)], axis=1))


def test_of_a_prompt_the_last_tokens_are_shown_to_who_asks_for_them_alone() -> None:
    notes = Notes()
    notes.prompt_tokens = 2  # type: ignore[attr-defined]
    model = tiny.build("mixtral")
    prompts = tiny.PROMPT
    with sluice.offload(model, device_memory="25%", predictor=notes) as session:
        with session.record(token_ids=True) as recorder:
            tiny.greedy(model, prompts)
        recorded = recorder.trace()
    first = notes.events[0]
    assert not first.decode and notes.events[LAYERS].decode
    assert first.requests.tolist() == [r for r in range(len(prompts)) for _ in range(2)]
    shown = first.experts.reshape(len(prompts), 2, -1)
    for row, sequence in zip(shown, recorded.sequences, strict=True):
        end = sequence.start + sequence.prompt_tokens
        truth = recorded.experts[end - 2 : end, 0]
        assert np.array_equal(np.sort(row, axis=1), np.sort(truth, axis=1))
    assert first.token_ids is not None
    assert np.array_equal(first.token_ids, prompts[:, -2:].reshape(-1).numpy())


def test_hints_and_keep_scores_reach_the_cache() -> None:
    _, stats = generated(Notes())
    assert stats.hints > 0
    _, silent = generated(Silent())
    assert silent.hints == 0


def test_a_predictor_that_raises_is_left_alone_and_counted(
    caplog: pytest.LogCaptureFixture,
) -> None:
    expected, _ = generated(None)
    with caplog.at_level(logging.WARNING, logger="sluice"):
        tokens, stats = generated(Failing())
    assert torch.equal(tokens, expected)
    assert stats.degradations["predictor_failed"] == 1
    assert "predictor failing: RuntimeError: no idea; the model goes on without it" in caplog.text


def test_several_may_follow_and_leave() -> None:
    model = tiny.build("mixtral")
    with sluice.offload(model, device_memory="25%") as session:
        first, second = Notes(), Notes()
        running = [session.predict(first), session.predict(second)]
        tiny.greedy(model, PROMPT)
        running[0].close()
        running[0].close()
        seen = len(first.steps)
        tiny.greedy(model, PROMPT)
        assert len(first.steps) == seen < len(second.steps)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"predictor": "token-tabel"}, "did you mean 'token-table'"),
        ({"predictor": "token-table"}, "knows nothing yet; expected a folder of a trained one"),
        ({"predictor": "/no/such/folder"}, "expected one of"),
        ({"predictor": 3}, "without name, begin_step"),
        ({"preset": "edgemoe"}, "sluice train path-table --trace FILE"),
        ({"preset": "edge"}, "expected one of edgemoe, expertflow"),
        ({"preset": "expertflow", "predictor": "x", "policy": "lru"}, "expected none or 'plec'"),
        ({"preset": "edgemoe", "predictor": Silent}, "a 'silent', beside preset='edgemoe'"),
    ],
)
def test_what_cannot_be_is_refused_and_the_model_stays(
    options: dict[str, Any], message: str
) -> None:
    model = tiny.build("mixtral")
    stock = tiny.greedy(model, PROMPT)
    with pytest.raises(ConfigError, match=message):
        sluice.offload(model, device_memory="25%", **options)
    assert torch.equal(tiny.greedy(model, PROMPT), stock)
    assert not hasattr(model, "sluice")


def planned_in(pace: _Pace, steps: range) -> list[int]:
    return [step for step in steps if pace.plans(step)]


def test_plans_come_rarer_while_they_slow_the_steps_and_again_when_they_do_not() -> None:
    pace = _Pace()
    assert len(planned_in(pace, range(256))) == 240, "all but the controls"
    step = 0

    def run(steps: int, planned_s: float) -> int:
        nonlocal step
        apart = 0
        for _ in range(steps):
            apart += pace.took(step, planned_s if pace.plans(step) else 1.0)
            step += 1
        return apart

    assert run(256, 1.01) == 0
    assert run(256 * 8, 1.5) == 3, "twice, four and eight times as far apart, and no further"
    assert planned_in(pace, range(64)) == [8, 24, 40, 56], "never none at all"
    run(256 * 4, 1.0)
    assert len(planned_in(pace, range(256))) == 240


def test_the_policy_goes_with_the_predictor_unless_it_is_named() -> None:
    assert OffloadOptions(device_memory=1).policy == "decayed-lfu"
    assert OffloadOptions(device_memory=1, predictor="popularity").policy == "forecast"
    named = OffloadOptions(device_memory=1, predictor=Notes, policy="lru")
    assert named.policy == "lru"
    assert named.to_dict()["predictor"] == "notes"
    preset = OffloadOptions(device_memory=1, predictor="folder", preset="expertflow")
    assert preset.policy == "plec"
    assert OffloadOptions.from_dict(preset.to_dict()) == preset


def test_several_predictors_follow_one_model() -> None:
    options = OffloadOptions(device_memory=1, predictor=[Notes, "popularity"])
    assert [getattr(each, "name", each) for each in options.predictors] == ["notes", "popularity"]
    assert options.to_dict()["predictor"] == ("notes", "popularity")
    named = OffloadOptions(device_memory=1, predictor=["a", "b"])
    assert OffloadOptions.from_dict(json.loads(json.dumps(named.to_dict()))) == named
    with pytest.raises(ConfigError, match="no one in a list"):
        OffloadOptions(device_memory=1, predictor=[])
    model = tiny.build("mixtral")
    expected = tiny.greedy(model, PROMPT)
    notes = [Notes(), Notes()]
    with sluice.offload(model, device_memory="25%", predictor=notes):
        assert torch.equal(tiny.greedy(model, PROMPT), expected)
    assert notes[0].events and notes[1].events


def test_other_threads_keep_torchs_threads() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        model = tiny.build("mixtral")
        with sluice.offload(model, device_memory="25%", predictor=Notes()):
            found: list[int] = []
            other = threading.Thread(target=lambda: found.append(torch.get_num_threads()))
            other.start()
            other.join()
            assert found == [2] and torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("wanted", [0, -3, "16"])
def test_prompt_tokens_that_are_none_are_refused(wanted: Any) -> None:
    predictor = Notes()
    predictor.prompt_tokens = wanted  # type: ignore[attr-defined]
    with pytest.raises(ConfigError, match=r"notes\.prompt_tokens: got"):
        generated(predictor)
