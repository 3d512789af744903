"""Misses under keep-scores, for choosing while a forecaster is fitted; `sluice.simulate` judges."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from sluice.predict.arrays import multi_hot

Array = NDArray[Any]


def misses(experts: Array, scores: Array, capacity: int) -> Array:
    """Counts what is not cached when an event begins; the best of cached and used stay then.

    Args:
        experts: int16 `[N, S, K]`, one token a step.
        scores: `[N, S, E, G]`: G rankings, larger stays.
        capacity: Experts that a layer's cache holds.

    Returns:
        int64 `[G]`, over all layers.
    """
    tokens, layers, num_experts, rankings = scores.shape
    used = multi_hot(experts, num_experts).astype(bool)[..., None]
    cached = np.zeros((layers, num_experts, rankings), bool)
    missed = np.zeros(rankings, np.int64)
    if capacity >= num_experts:
        return np.full(rankings, int(used.any(0).sum()), np.int64)
    for token in range(tokens):
        missed += (used[token] & ~cached).sum((0, 1))
        keep = np.where(cached | used[token], scores[token], -np.inf)
        best = np.argpartition(keep, num_experts - capacity, axis=1)[:, num_experts - capacity :]
        cached = np.zeros_like(cached)
        np.put_along_axis(cached, best, True, axis=1)
        cached &= keep > -np.inf
    return missed
