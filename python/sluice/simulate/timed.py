"""Routes through a session's own engine on a virtual clock: what waits, for how long."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sluice import _core
from sluice.simulate.guesses import Guesses
from sluice.simulate.routes import Routes
from sluice.stats import Stats

Array = NDArray[Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """What takes time.

    Args:
        bytes_per_second: Of the link that experts come over, one chunk after the other.
        seconds_per_chunk: What a chunk takes beside its bytes.
        depth: Chunks that may be started ahead: 2 on a copy engine, `io_threads` on a disk.
        chunk_bytes: Largest single copy.
        dense_seconds: Of a layer before its experts: attention, router.
        expert_seconds: Of one expert that is there.
    """

    bytes_per_second: float
    seconds_per_chunk: float = 0.0
    depth: int = 4
    chunk_bytes: int = 1 << 20
    dense_seconds: float = 0.0
    expert_seconds: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class TimedResult:
    """What a run on a virtual clock took.

    Args:
        stats: The engine's own counters; bytes are the model's, times the virtual clock's.
        step_seconds: float64 `[steps]`, of each step.
        num_tokens: Tokens that ran.
        demand_bytes: uint64 `[M]`, read because an event asked, sums from the start.
        wasted_bytes: uint64 `[M]`, read for guesses that were not used, sums from the start.
    """

    stats: Stats
    step_seconds: Array
    num_tokens: int
    demand_bytes: Array
    wasted_bytes: Array

    @property
    def seconds(self) -> float:
        """Of all steps."""
        return float(self.step_seconds.sum())

    @property
    def tokens_per_second(self) -> float:
        """All tokens over all steps' time."""
        return self.num_tokens / self.seconds


def run_timed(
    routes: Routes,
    machine: Machine,
    *,
    expert_bytes: int,
    slots: int,
    policy: str = "decayed-lfu",
    guesses: Guesses | None = None,
    scores: Array | None = None,
) -> TimedResult:
    """Runs routes through the product's cache, loader and transfer engine without bytes.

    Hits, late hits, misses and waits are judged by the same code as in a session; computing and
    copying take the machine's time.

    Args:
        routes: Of `routes_of`.
        machine: What takes time.
        expert_bytes: Of one expert, as it is stored.
        slots: Experts that memory holds, of all layers together.
        policy: Of a session (`sluice.OffloadOptions`).
        guesses: What prefetching is told.
        scores: float32 `[M, E]`, keep-scores of each event's layer, for the policies "forecast",
            "forecast:always" and "plec".

    Raises:
        ConfigError: What does not fit, by name.
        CapacityError: No slot at all.
    """
    columns: dict[str, Any] = {}
    if guesses is not None:
        columns = {
            "guess_begins": guesses.begins,
            "guess_layers": guesses.layers,
            "guess_experts": guesses.experts,
            "guess_probabilities": guesses.probabilities,
            "guess_steps": guesses.steps_ahead,
        }
    run = _core.run_timed(
        routes.core(),
        expert_bytes=expert_bytes,
        chunk_bytes=machine.chunk_bytes,
        bytes_per_second=machine.bytes_per_second,
        seconds_per_chunk=machine.seconds_per_chunk,
        depth=machine.depth,
        dense_seconds=machine.dense_seconds,
        expert_seconds=machine.expert_seconds,
        num_slots=slots,
        policy=policy,
        scores=None if scores is None else np.ascontiguousarray(scores, dtype=np.float32),
        **columns,
    )
    return TimedResult(
        stats=Stats.from_core(run["stats"]),
        step_seconds=np.diff(run["step_ends_ns"], prepend=0) / 1e9,
        num_tokens=routes.num_tokens,
        demand_bytes=run["demand_bytes"],
        wasted_bytes=run["wasted_bytes"],
    )
