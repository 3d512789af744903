"""Counts that fade: what a running sequence used lately, one half-life for all."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from sluice.errors import ConfigError
from sluice.predict.arrays import multi_hot
from sluice.trace import Trace

Array = NDArray[Any]


class DecayedCounts:
    """Uses of every expert in one sequence, halved every `half_life` tokens.

    Args:
        num_layers: S.
        num_experts: E.
        half_life: In tokens.

    Attributes:
        counts: float32 `[S, E]`.
        tokens: What `counts` of an expert that every token used would be.
    """

    __slots__ = ("_fade", "_num_experts", "counts", "tokens")

    def __init__(self, num_layers: int, num_experts: int, half_life: float) -> None:
        self._fade = np.float32(2.0 ** (-1.0 / half_life))
        self._num_experts = num_experts
        self.counts = np.zeros((num_layers, num_experts), np.float32)
        self.tokens = np.float32(0)

    def add(self, routes: Array) -> None:
        """One token's routes `[S, K]`."""
        self.counts *= self._fade
        self.counts += multi_hot(routes, self._num_experts)
        self.tokens = self.tokens * self._fade + np.float32(1)

    def blend(self, prior: Array, weight: float, layers: slice = slice(None)) -> Array:
        """Rates of the sequence on top of `prior`, which weighs as much as `weight` tokens."""
        weight32 = np.float32(weight)
        return (self.counts[layers] + weight32 * prior) / (self.tokens + weight32)


def blend_trace(prior: Array, weight: float, trace: Trace, half_life: float) -> Array:
    """`blend` for every token of a trace, from the tokens before it in its sequence, in place.

    Args:
        prior: float32 `[N, S, E]`, overwritten.
        weight: Of the prior, in tokens.
        trace: Whose sequences are followed.
        half_life: In tokens.

    Returns:
        `prior`.
    """
    for sequence in trace.sequences:
        running = DecayedCounts(trace.num_layers, trace.num_experts, half_life)
        for row in range(sequence.start, sequence.start + sequence.length):
            prior[row] = running.blend(prior[row], weight)
            running.add(trace.experts[row])
    return prior


def check_positive(**values: float) -> None:
    """Refuses settings that are not above 0.

    Raises:
        ConfigError: Naming the first.
    """
    for name, value in values.items():
        if not value > 0:
            raise ConfigError(f"{name}: got {value}, expected more than 0")
