"""Watches a generation token by token, by the way that every `generate` already offers."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sluice.session import Session
    from sluice.stats import Stats

_HELD = frozenset({"ready", "loading"})


@dataclass(frozen=True, slots=True)
class Step:
    """What one token cost, and who was in a slot when it was done.

    Args:
        time_s: Seconds since the recorder began.
        label: What was generated, such as a task's name.
        prefill: Whether the step ran a prompt rather than one token.
        hits: Experts that were in a slot when their layer asked.
        late: Experts on their way by a hint when asked.
        misses: Experts that had to be demanded.
        bytes_read: By reason: "demand", "hint used", "hint wasted", "hint pending".
        stall_s: Seconds that the caller waited for bytes.
        resident_bytes: Slot bytes holding an expert after the step.
        resident: (layer, expert) of every slot that holds one.
    """

    time_s: float
    label: str
    prefill: bool
    hits: int
    late: int
    misses: int
    bytes_read: dict[str, int]
    stall_s: float
    resident_bytes: int
    resident: frozenset[tuple[int, int]]


@dataclass(frozen=True, slots=True)
class Recording:
    """A generation as a list of steps, enough for every figure of this room.

    Args:
        experts: Number of experts of each MoE layer.
        budget_bytes: What the session was given.
        steps: One per token, oldest first.
    """

    experts: tuple[int, ...]
    budget_bytes: int
    steps: tuple[Step, ...]


@dataclass(slots=True)
class Recorder:
    """Give it to `generate(streamer=…)`; `recording()` is what it saw.

    It only reads: the tokens are the same with it and without.

    Args:
        session: The session of the model that generates.
        label: Goes into each step; change it between prompts.
    """

    session: Session
    label: str = ""
    _begin_s: float = field(default_factory=time.monotonic)
    _steps: list[Step] = field(default_factory=list)
    _before: Stats | None = None
    _puts: int = 0

    def put(self, value: object) -> None:
        """Takes a snapshot; `generate` calls it with the prompt, then with each token."""
        after = self.session.stats()
        if self._before is not None:
            self._steps.append(self._step(after - self._before, after.resident_bytes))
        self._before = after
        self._puts += 1

    def end(self) -> None:
        """Ends one generation; the recorder may be used for the next."""
        self._puts, self._before = 0, None

    def recording(self) -> Recording:
        """All steps so far."""
        experts = experts_per_layer(self.session)
        return Recording(experts, self.session.budget_bytes, tuple(self._steps))

    def _step(self, spent: Stats, resident_bytes: int) -> Step:
        return Step(
            time_s=time.monotonic() - self._begin_s,
            label=self.label,
            prefill=self._puts == 1,
            hits=spent.hits,
            late=spent.late,
            misses=spent.misses,
            bytes_read=spent.read_by_reason,
            stall_s=spent.stall_s,
            resident_bytes=resident_bytes,
            resident=residents(self.session),
        )


def residents(session: Session) -> frozenset[tuple[int, int]]:
    """(layer, expert) of every slot that holds an expert or is being filled with one."""
    return frozenset(
        (layer, expert)
        for size_class in session.residency()
        for state, layer, expert, _leases in size_class
        if state in _HELD
    )


def experts_per_layer(session: Session) -> tuple[int, ...]:
    """Number of experts of each MoE layer."""
    store = session.store
    return tuple(int(store.layer(i)["num_experts"]) for i in range(store.num_layers))
