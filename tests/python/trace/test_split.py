"""Splits: by sequence, by task, without overlap."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from sluice.errors import CheckpointError, ConfigError
from sluice.trace import (
    Split,
    Trace,
    TraceSequence,
    check_disjoint,
    content_hash,
    leave_out,
    split_by_sequence,
)


def make(counts: dict[str, int], twice: int = 0) -> Trace:
    """Sequences of one token, all different but the last `twice`, which repeat the first."""
    tasks = [task for task, count in counts.items() for _ in range(count)]
    codes = [*range(len(tasks) - twice), *range(twice)]
    experts = np.array([[[code // 64, code % 64 + 64]] for code in codes], dtype=np.int16)
    return Trace(
        experts=experts,
        num_experts=128,
        sequences=tuple(
            TraceSequence(i, 1, -1, task, f"r{i}", content_hash(None, experts[i : i + 1]))
            for i, task in enumerate(tasks)
        ),
    )


def test_each_task_is_dealt_by_its_own_shares() -> None:
    trace = make({"a": 127, "b": 13, "c": 40})
    split = split_by_sequence(trace, seed=3)
    sizes = {
        task: [len(split.of(trace.of_task(task), role).sequences) for role in Split.__slots__]
        for task in trace.tasks
    }
    assert sizes == {"a": [50, 13, 64], "b": [5, 1, 7], "c": [16, 4, 20]}
    assert split == split_by_sequence(trace, seed=3) != split_by_sequence(trace, seed=4)
    tenths = split_by_sequence(make({"a": 10}), (0.7, 0.1, 0.2))  # 0.7 + 0.1 is less than 0.8
    assert [len(getattr(tenths, role)) for role in Split.__slots__] == [7, 1, 2]


def test_in_order_the_first_part_fits_and_the_second_half_scores() -> None:
    trace = make({"a": 13})
    split = split_by_sequence(trace, shuffle=False)
    assert split.fit == tuple(s.content for s in trace.sequences[:5])
    assert split.score == tuple(s.content for s in trace.sequences[13 // 2 :])


def test_equal_sequences_land_in_one_role_across_tasks_too() -> None:
    trace = make({"a": 20, "b": 20}, twice=15)
    for seed in range(20):
        split = split_by_sequence(trace, seed=seed)
        roles = [len(split.of(trace, role).sequences) for role in Split.__slots__]
        assert sum(roles) == 40
        assert sum(len(getattr(split, role)) for role in Split.__slots__) == 25


def test_a_task_left_out_is_scored_whole_and_seen_by_nobody() -> None:
    trace = make({"a": 20, "b": 20}, twice=5)  # five of b are five of a
    split = leave_out(trace, "b")
    scored = {s.content for s in trace if s.task == "b"}
    assert set(split.score) == scored
    assert len(split.fit) + len(split.choose) == 15
    assert not scored & {*split.fit, *split.choose}
    check_disjoint([*split.fit, *split.choose], trace.of_task("b"))
    with pytest.raises(ConfigError, match="got task 'x' of 'a', 'b'"):
        leave_out(trace, "x")
    with pytest.raises(ConfigError, match="at least two"):
        leave_out(trace.of_task("a"), "a")


def test_an_overlap_is_refused_by_name() -> None:
    trace = make({"a": 4})
    contents = tuple(s.content for s in trace)
    with pytest.raises(ConfigError, match="got 1 sequences in fit and in score, the first"):
        Split(fit=contents[:2], choose=contents[2:3], score=contents[1:2])
    with pytest.raises(ConfigError, match="got 'abc' in choose, expected a content hash"):
        Split(fit=contents, choose=("abc",))
    with pytest.raises(ConfigError, match="2 of 4 sequences that the card has"):
        check_disjoint(contents[1:3], trace, reader="the card")
    check_disjoint(contents[:2], trace.select([2, 3]))
    with pytest.raises(ConfigError, match="1 sequences without a content hash"):
        unnamed = replace(trace.sequences[0], content="")
        check_disjoint([], replace(trace, sequences=(unnamed, *trace.sequences[1:])))


def test_shares_that_are_none_are_refused() -> None:
    for shares in ((0.5, 0.1, 0.5), (1.5, -0.5, 0.0)):
        with pytest.raises(ConfigError, match="three that sum to 1"):
            split_by_sequence(make({"a": 4}), shares)


def test_a_split_comes_back_from_its_file_and_a_bad_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "split.json"
    split = split_by_sequence(make({"a": 10}))
    split.save(path)
    assert Split.load(path) == split
    fields = json.loads(path.read_text())
    for change, message in (
        ({"schema": 2}, "no split of schema 1"),
        ({"fit": "all"}, "got fit = 'all'"),
        ({"choose": [1]}, "got 1 in choose"),
        ({"choose": fields["fit"]}, "in fit and in choose"),
    ):
        path.write_text(json.dumps(fields | change))
        with pytest.raises((CheckpointError, ConfigError), match=message):
            Split.load(path)
    with pytest.raises(CheckpointError, match="no readable JSON"):
        Split.load(tmp_path / "absent")
    with pytest.raises(ConfigError, match="got role 'test'"):
        split.of(make({"a": 1}), "test")
