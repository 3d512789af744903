"""Counts that recall, precision, B_acc and calibration are made of: arrays in, arrays out.

T is the true set of an event: the experts of one token at one layer, or the union of a batch.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

BINS = 10


def hits_at(scores: Array, truth: Array, depths: tuple[int, ...]) -> Array:
    """c_n: members of T among the first n by score; equal scores rank the lower id first.

    Args:
        scores: float `[M, E]`.
        truth: bool `[M, E]`.
        depths: The n, each at most E.

    Returns:
        int64 `[M, len(depths)]`.
    """
    ordered = _ranked(scores, truth, max(depths, default=0))
    return np.cumsum(ordered, axis=-1, dtype=np.int64)[:, [n - 1 for n in depths]]


def set_hits(scores: Array, truth: Array, multiples: tuple[float, ...]) -> tuple[Array, Array]:
    """Members of T in a predicted set of `round(multiple |T|)` experts, at most E.

    Args:
        scores: float `[M, E]`.
        truth: bool `[M, E]`.
        multiples: Sizes of the predicted set, as multiples of the true set's.

    Returns:
        Hits and sizes, each int64 `[M, len(multiples)]`.
    """
    experts = truth.shape[-1]
    so_far = np.cumsum(_ranked(scores, truth, experts), axis=-1, dtype=np.int64)
    so_far = np.concatenate([np.zeros((len(so_far), 1), np.int64), so_far], axis=1)
    wanted = truth.sum(-1, keepdims=True) * np.asarray(multiples)
    sizes = np.minimum(np.floor(wanted + 0.5).astype(np.int64), experts)
    return np.take_along_axis(so_far, sizes, axis=1), sizes


def calibration_counts(scores: Array, truth: Array) -> Array:
    """Per tenth of predicted probability: how many, their sum, how many came true.

    Returns:
        float64 `[10, 3]`.
    """
    flat = scores.reshape(-1)
    which = np.minimum((flat * BINS).astype(np.int64), BINS - 1)
    return np.stack(
        [
            np.bincount(which, minlength=BINS).astype(np.float64),
            np.bincount(which, weights=flat, minlength=BINS),
            np.bincount(which, weights=truth.reshape(-1), minlength=BINS),
        ],
        axis=1,
    )


def bootstrap(
    totals: Array, counts: Array, *, resamples: int, seed: int, groups: Array | None = None
) -> tuple[Array, Array]:
    """The 95 % interval of a mean over tokens, when sequences are drawn again.

    Args:
        totals: float `[sequences, M]`: sums of a figure over a sequence's tokens.
        counts: float `[sequences]`: over how many.
        resamples: How often.
        seed: Of the draws.
        groups: int `[sequences]`: draw within each, and take the mean of the groups' means;
            None: all are one.

    Returns:
        Lower and upper ends, each `[M]`.
    """
    rng = np.random.default_rng(seed)
    owner = np.zeros(len(counts), np.int64) if groups is None else groups
    means = np.zeros((resamples, totals.shape[1]))
    kinds = np.unique(owner)
    for kind in kinds:
        members = np.flatnonzero(owner == kind)
        drawn = rng.integers(0, len(members), (resamples, len(members)))
        times = np.apply_along_axis(np.bincount, 1, drawn, minlength=len(members))
        means += (times @ totals[members]) / (times @ counts[members])[:, None] / len(kinds)
    low, high = np.quantile(means, [0.025, 0.975], axis=0)
    return low, high


def lanes(lengths: list[int], batch: int) -> list[list[int]]:
    """Sequences dealt to `batch` lanes, each to the one with the fewest tokens so far.

    A lane plays its sequences one after another; a step takes one token of every lane.
    """
    dealt: list[list[int]] = [[] for _ in range(batch)]
    tokens = [0] * batch
    for number, length in enumerate(lengths):
        shortest = tokens.index(min(tokens))
        dealt[shortest].append(number)
        tokens[shortest] += length
    return dealt


def _ranked(scores: Array, truth: Array, depth: int) -> Array:
    """Truth in order of falling scores, the first `depth`."""
    order = np.argsort(-scores, axis=-1, kind="stable")[:, :depth]
    return np.take_along_axis(truth, order, axis=-1)
