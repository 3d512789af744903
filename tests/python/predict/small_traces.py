"""Small random traces with structure: tokens, topics and layers that depend on each other."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from sluice.trace import Trace, TraceSequence, content_hash


def random_trace(
    seed: int = 0,
    *,
    sequences: tuple[int, ...] = (9, 14, 5),
    layers: int = 4,
    experts: int = 8,
    top_k: int = 2,
    vocabulary: int = 12,
    hidden: int = 0,
    tasks: tuple[str, ...] = ("one", "two"),
    model: str = "model-a",
) -> Trace:
    """Routes from scores that a token id, a task and the previous token's routes push."""
    rng = np.random.default_rng(seed)
    shared = np.random.default_rng(12345)  # what a token id and a task mean is the same everywhere
    of_token = shared.normal(size=(vocabulary, layers, experts))
    of_task = shared.normal(size=(len(tasks), layers, experts))
    total = sum(sequences)
    ids = rng.integers(0, vocabulary, total)
    routes = np.zeros((total, layers, top_k), np.int16)
    weights = np.zeros((total, layers, top_k), np.float32)
    spans: list[TraceSequence] = []
    start = 0
    for number, length in enumerate(sequences):
        task = number % len(tasks)
        before = np.zeros((layers, experts))
        for row in range(start, start + length):
            scores = of_token[ids[row]] + of_task[task] + before + rng.normal(size=before.shape)
            top = np.argsort(-scores, axis=-1)[:, :top_k]
            routes[row] = top
            chosen = np.exp(np.take_along_axis(scores, top, -1))
            weights[row] = chosen / np.exp(scores).sum(-1, keepdims=True)
            before = np.zeros_like(before)
            np.put_along_axis(before, top, 1.0, axis=-1)
        rows = slice(start, start + length)
        content = content_hash(ids[rows].astype(np.int32), routes[rows])
        spans.append(TraceSequence(start, length, task=tasks[task], content=content))
        start += length
    states = None
    if hidden:
        states = rng.normal(size=(total, layers, hidden)).astype(np.float16)
    return Trace(
        experts=routes,
        num_experts=experts,
        sequences=tuple(spans),
        weights=weights,
        token_ids=ids.astype(np.int32),
        hidden=states,
        model=model,
        source="random",
    )


def with_future_changed(trace: Trace, row: int, layers: int, ids_from: int, seed: int) -> Trace:
    """The same trace but for everything that may not be read yet at one point of time.

    Args:
        trace: What is copied.
        row: The running token.
        layers: Its first layers, which have routed and stay.
        ids_from: First row whose token id changes.
        seed: Of the new values.
    """
    rng = np.random.default_rng(seed)
    routes, weights = trace.experts.copy(), _copy(trace.weights)
    ids, hidden = _copy(trace.token_ids), _copy(trace.hidden)
    shape = trace.experts.shape
    other = np.argsort(rng.random((*shape[:2], trace.num_experts)), -1)[..., : shape[2]]
    other_weights = rng.random(shape).astype(np.float32)
    for array, fresh in ((routes, other), (weights, other_weights)):
        array[row + 1 :] = fresh[row + 1 :]
        array[row, layers:] = fresh[row, layers:]
    ids[ids_from:] = rng.integers(0, ids.max() + 1, len(ids) - ids_from)
    if hidden is not None:
        hidden[row + 1 :] = rng.normal(size=hidden[row + 1 :].shape)
        hidden[row, layers:] = rng.normal(size=hidden[row, layers:].shape)
    return dataclasses.replace(trace, experts=routes, weights=weights, token_ids=ids, hidden=hidden)


def _copy(array: Any) -> Any:
    return None if array is None else array.copy()
