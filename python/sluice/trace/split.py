"""Who may see which sequence: lists of content hashes, one per role.

Sequences of a task open with the same template and tokens of one text are alike, so a split is by
sequence, never by token; and what a fit, an early stop or a calibration has read is never scored.
"""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any, cast

import numpy as np

from sluice.errors import CheckpointError, ConfigError
from sluice.trace.trace import Trace

ROLES = ("fit", "choose", "score")
_SCHEMA = 1
_HASH = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Split:
    """Content hashes of sequences by role.

    Args:
        fit: What parameters are fitted on.
        choose: What early stop, calibration and settings are chosen on.
        score: What is reported.

    Raises:
        ConfigError: A hash that is none, or one of two roles.
    """

    fit: tuple[str, ...]
    choose: tuple[str, ...] = ()
    score: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for role in ROLES:
            for content in getattr(self, role):
                if not isinstance(content, str) or not _HASH.fullmatch(content):
                    raise ConfigError(
                        f"split: got {content!r} in {role}, expected a content hash of 64 "
                        "hexadecimal digits; `sluice.trace.save` and the recorder make them"
                    )
        for one, other in combinations(ROLES, 2):
            both = set(getattr(self, one)) & set(getattr(self, other))
            if both:
                raise ConfigError(
                    f"split: got {len(both)} sequences in {one} and in {other}, the first "
                    f"{min(both)}; expected each in one role"
                )

    def of(self, trace: Trace, role: str) -> Trace:
        """The sequences of one role, in the trace's order.

        Raises:
            ConfigError: No such role.
        """
        if role not in ROLES:
            raise ConfigError(f"split: got role {role!r}, expected one of {', '.join(ROLES)}")
        return trace.by_content(getattr(self, role))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes it as JSON."""
        fields = {"schema": _SCHEMA, **{role: list(getattr(self, role)) for role in ROLES}}
        Path(path).write_text(json.dumps(fields, indent=1) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Split:
        """Reads what `save` wrote.

        Raises:
            CheckpointError: No such file, or none of ours.
            ConfigError: An overlap of roles.
        """
        try:
            fields = json.loads(Path(path).read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise CheckpointError(f"{path}: got no readable JSON: {error}") from None
        if not isinstance(fields, dict) or fields.get("schema") != _SCHEMA:
            raise CheckpointError(f"{path}: got no split of schema {_SCHEMA}")
        known = cast("dict[str, Any]", fields)
        lists = {role: known.get(role) for role in ROLES}
        for role, contents in lists.items():
            if not isinstance(contents, list):
                raise CheckpointError(f"{path}: got {role} = {contents!r}, expected a list")
        return cls(**{role: tuple(cast("list[str]", lists[role])) for role in ROLES})


def split_by_sequence(
    trace: Trace,
    shares: tuple[float, float, float] = (0.4, 0.1, 0.5),
    *,
    seed: int = 0,
    shuffle: bool = True,
) -> Split:
    """Deals each task's sequences to fit, choose and score.

    Sequences of the same content count once and go the same way. A task of n contents gives fit
    floor(share n) of them, fit and choose together floor of their shares' sum; the rest is score.

    Args:
        trace: Every sequence with its content hash.
        shares: Of fit, choose and score; they sum to 1.
        seed: Of the shuffle.
        shuffle: False deals in the trace's order, the first part to fit.

    Raises:
        ConfigError: Shares that are negative or do not sum to 1, or a sequence without a hash.
    """
    if min(shares) < 0 or abs(sum(shares) - 1) > 1e-9:
        raise ConfigError(f"shares: got {shares}, expected three that sum to 1, none below 0")
    roles: dict[str, list[str]] = {role: [] for role in ROLES}
    rng = np.random.default_rng(seed)
    for contents in _contents_by_task(trace).values():
        dealt = [contents[i] for i in rng.permutation(len(contents))] if shuffle else contents
        # The small term: 0.4 of ten is four, whatever 0.4 is in binary.
        first, second = (int(len(dealt) * s + 1e-9) for s in (shares[0], shares[0] + shares[1]))
        roles["fit"] += dealt[:first]
        roles["choose"] += dealt[first:second]
        roles["score"] += dealt[second:]
    return Split(**{role: tuple(contents) for role, contents in roles.items()})


def leave_out(
    trace: Trace, task: str, *, shares: tuple[float, float] = (0.8, 0.2), seed: int = 0
) -> Split:
    """Scores one task on what was fitted and chosen on all others: a domain never seen.

    Args:
        trace: Several tasks.
        task: The one to score, all of it.
        shares: Of fit and choose among the others' sequences.
        seed: Of the shuffle.

    Raises:
        ConfigError: No such task, or no other one.
    """
    if task not in trace.tasks or len(trace.tasks) < 2:
        raise ConfigError(
            f"leave_out: got task {task!r} of {', '.join(map(repr, trace.tasks))}, expected one of "
            "at least two"
        )
    scored = tuple(dict.fromkeys(s.content for s in trace if s.task == task))
    others = trace.select(
        i
        for i, sequence in enumerate(trace)
        if sequence.task != task and sequence.content not in scored
    )
    rest = split_by_sequence(others, (*shares, 0.0), seed=seed)
    # What floors left over belongs to what is chosen on: score is the left-out task alone.
    return Split(fit=rest.fit, choose=rest.choose + rest.score, score=scored)


def check_disjoint(read: Iterable[str], trace: Trace, *, reader: str = "the fit") -> None:
    """Refuses to score sequences that a fit has read.

    Args:
        read: Content hashes, as a predictor's card lists them: fit, early stop and calibration.
        trace: What is to be scored.
        reader: Who read them, for the message.

    Raises:
        ConfigError: At least one sequence was read; the message names the first.
    """
    _require_hashes(trace)
    seen = set(read)
    both = [sequence for sequence in trace if sequence.content in seen]
    if both:
        first = both[0]
        raise ConfigError(
            f"score: got {len(both)} of {len(trace.sequences)} sequences that {reader} has read, "
            f"the first {first.request or first.content[:16]!r} of task {first.task!r}; expected "
            "none; score the split's own sequences"
        )


def _contents_by_task(trace: Trace) -> dict[str, list[str]]:
    """Contents in order, each once, under the task where it comes first."""
    _require_hashes(trace)
    task_of: dict[str, str] = {}
    for sequence in trace:
        task_of.setdefault(sequence.content, sequence.task)
    tasks: dict[str, list[str]] = {}
    for content, task in task_of.items():
        tasks.setdefault(task, []).append(content)
    return tasks


def _require_hashes(trace: Trace) -> None:
    without = Counter(sequence.content == "" for sequence in trace)[True]
    if without:
        raise ConfigError(
            f"split: got {without} sequences without a content hash, expected all with one; save "
            "and load the trace"
        )
