"""Rates of experts over whole traces, as most predictors start from."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from sluice.errors import CheckpointError
from sluice.predict.arrays import multi_hot
from sluice.trace import Trace

Array = NDArray[Any]

_ROWS_AT_ONCE = 4096


def expert_counts(trace: Trace) -> Array:
    """How many tokens used each expert: float64 `[S, E]`."""
    counts = np.zeros((trace.num_layers, trace.num_experts))
    for start in range(0, trace.num_tokens, _ROWS_AT_ONCE):
        counts += multi_hot(trace.experts[start : start + _ROWS_AT_ONCE], trace.num_experts).sum(0)
    return counts


def expert_rates(trace: Trace) -> Array:
    """The share of tokens that used each expert: float32 `[S, E]`."""
    return (expert_counts(trace) / max(trace.num_tokens, 1)).astype(np.float32)


def check_rates(name: str, rates: Array) -> Array:
    """The same array.

    Raises:
        CheckpointError: A rate is no probability.
    """
    if rates.size and (rates.min() < 0 or rates.max() > 1):
        raise CheckpointError(f"predictor: got {name} outside of 0 to 1")
    return rates
