"""How rows on foresight name their figures: `replay/foresight.py` writes, the report reads."""

import re
from collections.abc import Iterable
from typing import NamedTuple

FIRST_LAYER = 1
"""Of the layers that recall is of: those before it are not scored."""

WITHOUT = " without "
"""Between a predictor and the task that was left out of its fit."""


class Place(NamedTuple):
    """The mode of a row of "gap_closed"."""

    stream: str
    batch: int
    contender: str

    def __str__(self) -> str:
        """As "STREAM: CONTENDER" or "STREAM, batch B: CONTENDER"."""
        batch = f", batch {self.batch}" if self.batch > 1 else ""
        return f"{self.stream}{batch}: {self.contender}"

    @classmethod
    def parse(cls, mode: str) -> "Place":
        """From its text form."""
        where, _, contender = mode.partition(": ")
        stream, _, batch = where.partition(", batch ")
        return cls(stream, int(batch or 1), contender)


def at_horizon(horizon: str | int, figure: str) -> str:
    """Of a figure that each horizon has: "token: exact set"."""
    return f"{horizon}: {figure}"


def recall_key(horizon: str | int, n: int, of: str = "") -> str:
    """Of recall@n, or what it says `of` it: "low", "high", "worst task", "by layer"."""
    return at_horizon(horizon, f"recall@{n} {of}".rstrip())


def precision_key(horizon: str | int, n: int) -> str:
    return at_horizon(horizon, f"precision@{n}")


def recall_depths(keys: Iterable[str], horizon: str | int) -> list[int]:
    """The n of recall@n at a horizon, the smallest first: that is K."""
    found = (re.fullmatch(rf"{horizon}: recall@(\d+)", key) for key in keys)
    return sorted(int(each[1]) for each in found if each)


class UnionKey(NamedTuple):
    """Of a figure about a batch's union of experts.

    Args:
        horizon: As `predict.evaluate` takes it, in text.
        batch: Requests.
        size: Of the predicted set over the true one, or "all" for all experts.
        figure: "b_acc" or "precision".
    """

    horizon: str
    batch: int
    size: str
    figure: str

    def __str__(self) -> str:
        what = f"batch {self.batch}, {self.size} x the true set: {self.figure}"
        return at_horizon(self.horizon, what)

    @classmethod
    def parse(cls, key: str) -> "UnionKey | None":
        """From its text form; None for the key of another figure."""
        found = re.fullmatch(r"(\w+): batch (\d+), (\S+) x the true set: (\w+)", key)
        return cls(found[1], int(found[2]), found[3], found[4]) if found else None
