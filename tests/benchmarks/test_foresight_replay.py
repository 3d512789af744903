"""replay/foresight.py: gaps that are none, figures by seed, what is read of a file."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import machine
from replay import foresight
from sluice import trace

EXPERTS, TOP_K = 8, 2
DATA = foresight.ROOT / "data"
WORK = {"slots": [0.25, 1.0], "policies": ["fifo", "lfu"], "streams": ["mix"], "batches": [1]}


def a_trace(*sequences: np.ndarray) -> trace.Trace:
    """Of sequences of experts `[T, S, K]`, all of one task."""
    found: list[trace.TraceSequence] = []
    for i, each in enumerate(sequences):
        start = sum(map(len, sequences[:i]))
        found.append(trace.TraceSequence(start, len(each), task="only", content=str(i)))
    experts = np.concatenate(sequences).astype(np.int16)
    return trace.Trace(experts=experts, num_experts=EXPERTS, sequences=tuple(found))


def random_routes(seed: int, tokens: int = 24) -> np.ndarray:
    rng = np.random.default_rng(seed)
    shape = (tokens, 2, EXPERTS)
    return np.argsort(rng.random(shape), axis=-1)[..., :TOP_K]


def a_row(figures: list[dict[str, Any]]) -> Any:
    """As it is read again."""
    scenario = {"name": "a", "sha256": "s", "workload": {}, "predictors": {}}
    made = foresight.one(scenario, {}, "mix: fifo", "gap_closed", figures)
    return json.loads(machine.canonical(made))


def test_what_is_worse_than_lru_where_belady_saves_nothing_closes_no_gap() -> None:
    lru, policy, belady = np.array([10.0, 10.0]), np.array([12.0, 12.0]), np.array([10.0, 6.0])
    gaps = foresight.closed(lru, policy, belady)
    assert np.isnan(gaps[0]) and gaps[1] == -0.5
    assert foresight.known_mean(gaps) == -0.5
    assert foresight.known_mean(gaps[:1]) is None


@pytest.mark.parametrize("batch", [1, 2])
def test_slots_for_all_experts_have_no_gap_and_are_left_out_of_the_mean(batch: int) -> None:
    scored = a_trace(*map(random_routes, range(3)))
    (stream,) = foresight.streams(scored, WORK)
    figures = (
        foresight.judge(stream, scored, {}, WORK)
        if batch == 1
        else foresight.judge_batch(stream, batch, scored, WORK)
    )
    assert {"lru", "fifo", "lfu", "belady"} <= set(figures)
    for of in figures.values():
        assert of["gap_1"] is None and of["gap_0.25"] is not None
        assert of["value"] == of["gap_0.25"]
        assert of["hits_1"] > of["hits_0.25"]
    assert (figures["lru"]["value"], figures["belady"]["value"]) == (0, 1)
    if batch == 1:
        assert all(-10 < of["low"] <= of["value"] <= of["high"] <= 1 for of in figures.values())
        assert (figures["belady"]["low"], figures["belady"]["high"]) == (1, 1)


def test_without_a_gap_at_any_slots_there_is_no_interval() -> None:
    scored = a_trace(*map(random_routes, range(3)))
    work = WORK | {"slots": [1.0]}
    (stream,) = foresight.streams(scored, work)
    fifo = foresight.judge(stream, scored, {}, work)["fifo"]
    names = ("value", "gap_1", "low", "high", "without_shared_tokens")
    assert [fifo[name] for name in names] == [None] * 5


def test_where_all_tokens_are_shared_nothing_is_said_without_them() -> None:
    same = random_routes(0)
    (stream,) = foresight.streams(a_trace(same, same), WORK)
    fifo = foresight.judge(stream, stream.trace, {}, WORK)["fifo"]
    assert fifo["without_shared_tokens"] is None and fifo["value"] is not None


def test_a_seed_without_a_figure_is_left_out_and_without_any_it_is_null() -> None:
    row = a_row(
        [
            {"value": 0.5, "gap_1": None, "low": 0.25, "layers": [0.0, 1.0]},
            {"value": None, "gap_1": None, "low": None, "layers": [1.0, 1.0]},
        ]
    )
    assert (row["samples"], row["n"]) == ([0.5], 1)
    assert row["derived"] == {"gap_1": None, "low": 0.25, "layers": [0.5, 1.0]}


def test_a_row_with_a_nan_is_refused() -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        a_row([{"value": 0.5, "gap_1": float("nan")}])


def test_of_a_file_some_sequences_are_read_and_none_is_copied_in_vain(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    name = "data/reference_valid.trace.safetensors"
    stored = trace.load(foresight.ROOT / name)
    with monkeypatch.context() as patch:
        patch.setattr(trace.Trace, "select", None)
        path, whole = foresight.part_of(name, 1)
    assert path == foresight.ROOT / name
    assert whole.sequences == stored.sequences
    _, some = foresight.part_of(name, 4)
    assert [s.content for s in some] == [s.content for s in stored.sequences[::4]]
    _, first = foresight.part_of(name, 4, 2)
    assert set(first.tasks) == set(some.tasks)
    for task in some.tasks:
        contents = [s.content for s in some if s.task == task]
        assert [s.content for s in first if s.task == task] == contents[:2]


def test_of_recorded_text_only_what_is_read_is_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def recorded(role: str, **settings: Any) -> Path:
        asked.append((role, settings))
        return DATA / f"reference_{role}.trace.safetensors"

    monkeypatch.setattr(foresight, "recorded", recorded)
    path, read = foresight.part_of("recorded:valid", 3)
    assert asked == [("valid", {"hidden": True, "every": 3})]
    assert len(read.sequences) == len(trace.load(path).sequences)
