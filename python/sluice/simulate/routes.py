"""A trace as the events that a cache sees: visits of layers, each with its distinct experts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sluice import _core
from sluice.errors import ConfigError
from sluice.trace import Trace

Array = NDArray[Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Routes:
    """M events in order of (step, layer).

    Args:
        num_layers: S.
        num_experts: E, of the largest layer.
        steps: int64 `[M]`.
        layers: int32 `[M]`.
        begins: int64 `[M + 1]`: where each event's experts begin in `experts`.
        experts: int32, each event's distinct ones: by row of the batch, the heaviest first.
        weights: float32 beside `experts` (the batch's sum), or None.
        rows: int64 `[M]`: the trace's row of each event where the batch is 1, else None.
        num_tokens: Rows of the trace that are in it.
    """

    num_layers: int
    num_experts: int
    steps: Array
    layers: Array
    begins: Array
    experts: Array
    weights: Array | None
    rows: Array | None
    num_tokens: int

    @property
    def num_events(self) -> int:
        """M."""
        return int(self.steps.shape[0])

    def core(self) -> _core.Routes:
        """The same for the core, which checks it when it runs."""
        return _core.Routes(
            self.num_layers,
            self.num_experts,
            self.steps,
            self.layers,
            self.begins,
            self.experts,
            self.weights,
        )


def routes_of(trace: Trace, *, batch: int = 1, phase: str = "all") -> Routes:
    """The events of a trace's sequences, in order, each token once.

    Args:
        trace: What to replay.
        batch: Sequences that run side by side. One that ends gives its place to the next; a step
            takes one token of each.
        phase: "all" tokens, or those of "decode" or "prefill" alone, where the trace knows which.

    Raises:
        ConfigError: A batch below 1, or a phase that the trace did not record.
    """
    if batch < 1:
        raise ConfigError(f"batch: got {batch}, expected at least 1")
    spans = [np.asarray(trace.phase_rows(i, phase)) for i in range(len(trace.sequences))]
    steps = _side_by_side([rows for rows in spans if rows.size], batch)
    return _of_single_rows(trace, steps[:, 0]) if batch == 1 else _of_batches(trace, steps)


def _side_by_side(spans: Sequence[Array], batch: int) -> Array:
    """int64 `[steps, batch]`: the row of each place in each step, -1 where a place is idle."""
    if batch == 1:
        return np.concatenate([*spans, np.arange(0)])[:, None]
    places: list[list[Array]] = [[] for _ in range(batch)]
    lengths = [0] * batch
    for rows in spans:  # to the place that is free first
        place = lengths.index(min(lengths))
        places[place].append(rows)
        lengths[place] += rows.size
    steps = np.full((max(lengths), batch), -1, dtype=np.int64)
    for place, rows in enumerate(places):
        steps[: lengths[place], place] = np.concatenate([*rows, np.arange(0)])
    return steps


def _of_single_rows(trace: Trace, rows: Array) -> Routes:
    chosen = trace.experts[rows].astype(np.int32)
    there = chosen >= 0
    tokens, layers, _ = chosen.shape
    counts = there.sum(axis=2).reshape(-1)
    return Routes(
        num_layers=layers,
        num_experts=trace.num_experts,
        steps=np.repeat(np.arange(tokens, dtype=np.int64), layers),
        layers=np.tile(np.arange(layers, dtype=np.int32), tokens),
        begins=np.concatenate([[0], np.cumsum(counts)]).astype(np.int64),
        experts=chosen[there],
        weights=None if trace.weights is None else trace.weights[rows][there].astype(np.float32),
        rows=np.repeat(rows.astype(np.int64), layers),
        num_tokens=tokens,
    )


def _of_batches(trace: Trace, steps: Array) -> Routes:
    experts: list[Array] = []
    weights: list[Array] = []
    for rows in steps:
        here = rows[rows >= 0]
        for layer in range(trace.num_layers):
            chosen = trace.experts[here, layer].reshape(-1)
            there = chosen >= 0
            distinct, first, inverse = np.unique(
                chosen[there], return_index=True, return_inverse=True
            )
            order = np.argsort(first)
            experts.append(distinct[order].astype(np.int32))
            if trace.weights is not None:
                flat = trace.weights[here, layer].reshape(-1)[there]
                weights.append(np.bincount(inverse, weights=flat)[order].astype(np.float32))
    counts = [each.size for each in experts]
    return Routes(
        num_layers=trace.num_layers,
        num_experts=trace.num_experts,
        steps=np.repeat(np.arange(len(steps), dtype=np.int64), trace.num_layers),
        layers=np.tile(np.arange(trace.num_layers, dtype=np.int32), len(steps)),
        begins=np.concatenate([[0], np.cumsum(counts)]).astype(np.int64),
        experts=np.concatenate([*experts, np.zeros(0, np.int32)]),
        weights=None if trace.weights is None else np.concatenate(weights),
        rows=None,
        num_tokens=int((steps >= 0).sum()),
    )
