"""EdgeMoE's preloading of one layer: load by probability until the router has answered.

Source: 2308.14352 §III-C1. That a load also stops when less time is left than it takes, the cap of
three, and that a refuted hint which has not started is cancelled are readings of this project. It
knows no clock and moves no bytes: who drives it says when, on a virtual clock or a real one.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sluice.errors import ConfigError

Array = NDArray[Any]

CAP = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerOutcome:
    """What preloading was worth in one layer.

    Args:
        hits: Experts asked for that were there when the router answered, residents included.
        preloaded: Loads that had ended by then.
        late: Loads under way by then that are asked for: they are waited for.
        cancelled: Loads that had not started.
        wasted: Loads, ended or under way, that nobody asked for.
        demands: Experts that are read on demand, in the router's order.
    """

    hits: tuple[int, ...]
    preloaded: tuple[int, ...]
    late: tuple[int, ...]
    cancelled: tuple[int, ...]
    wasted: tuple[int, ...]
    demands: tuple[int, ...]


class LayerPreloader:
    """Loads of one layer between the moment it is entered and its router's answer.

    Args:
        probabilities: float32 `[E]`: P(e) of this layer.
        residents: Experts that are there.
        load_s: What one load takes.
        router_at_s: When the router will answer, as far as that is known; None: it is not.
        cap: Loads at most.
        start: Called with an expert whose load starts.

    Raises:
        ConfigError: A time or the cap below 0.
    """

    def __init__(
        self,
        probabilities: Array,
        residents: Collection[int],
        *,
        load_s: float,
        router_at_s: float | None = None,
        cap: int = CAP,
        start: Callable[[int], None] | None = None,
    ) -> None:
        if load_s < 0 or cap < 0:
            raise ConfigError(f"preload: got load_s {load_s} and cap {cap}, expected none below 0")
        order: list[int] = np.argsort(-probabilities, kind="stable").tolist()
        held = set(residents)
        self._queue = [e for e in order if e not in held and probabilities[e] > 0][:cap]
        self._residents = held
        self._load_s, self._router_at_s = load_s, router_at_s
        self._start = start or _nobody
        self._running: int | None = None
        self._ended: list[int] = []
        self._answered = False

    @property
    def running(self) -> int | None:
        """The expert whose load is under way."""
        return self._running

    def step(self, now_s: float) -> int | None:
        """Starts the next load if the link is idle and there is time for it.

        Args:
            now_s: The time.

        Returns:
            The expert whose load started, or None: a load is under way, nothing is left to load,
            the router has answered, or will have before a load could end.
        """
        if self._answered or self._running is not None or not self._queue:
            return None
        if self._router_at_s is not None and self._router_at_s - now_s < self._load_s:
            return None
        expert = self._queue.pop(0)
        self._running = expert
        self._start(expert)
        return expert

    def load_ended(self) -> None:
        """The load that was under way is there."""
        if self._running is not None:
            self._ended.append(self._running)
            self._running = None

    def answer(self, experts: Collection[int]) -> LayerOutcome:
        """The router has answered: nothing more is started but demands.

        Args:
            experts: What the layer needs, in the order in which it is read.

        Returns:
            Who is there, who is waited for, who is read now.
        """
        self._answered = True
        wanted = list(dict.fromkeys(experts))
        there = self._residents | set(self._ended)
        running = () if self._running is None else (self._running,)
        late = tuple(e for e in running if e in wanted)
        cancelled, self._queue = tuple(self._queue), []
        return LayerOutcome(
            hits=tuple(e for e in wanted if e in there),
            preloaded=tuple(self._ended),
            late=late,
            cancelled=cancelled,
            wasted=tuple(e for e in (*self._ended, *running) if e not in wanted),
            demands=tuple(e for e in wanted if e not in there and e not in late),
        )


def _nobody(expert: int) -> None:
    """Nobody is told."""
