"""Who guesses and ranks inside of a session's forwards, by numbers that outlive its core."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any

from sluice import _core


class Scorers:
    """The scorers of one session.

    Args:
        core: Whose forwards they are asked in.
    """

    def __init__(self, core: _core.Session) -> None:
        self._core = core
        self._numbers = itertools.count(1)
        self._kept: dict[int, tuple[str, dict[str, Any], int]] = {}

    def add(self, kind: str, tables: Mapping[str, Any]) -> int:
        """One more; the number to remove it by."""
        number = next(self._numbers)
        self._kept[number] = (kind, dict(tables), self._core.add_scorer(kind, dict(tables)))
        return number

    def remove(self, number: int) -> None:
        """Nothing where there is none of that number."""
        if number in self._kept:
            self._core.remove_scorer(self._kept[number][2])
            del self._kept[number]

    def moved_to(self, core: _core.Session) -> Scorers:
        """The same in another core, by the same numbers; this one stays as it is."""
        there = Scorers(core)
        there._numbers = self._numbers
        for number, (kind, tables, _) in self._kept.items():
            there._kept[number] = (kind, tables, core.add_scorer(kind, tables))
        return there
