"""Arrays that predictors share: sets of experts as ones, and what a saved state must look like."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sluice.errors import CheckpointError
from sluice.trace import Trace

Array = NDArray[Any]


def multi_hot(experts: Array, num_experts: int) -> Array:
    """Ids `[..., K]` as float32 `[..., E]` of ones; -1 marks nothing."""
    hot = np.zeros((*experts.shape[:-1], num_experts + 1), np.float32)
    np.put_along_axis(hot, experts.astype(np.int64), 1.0, axis=-1)  # -1 is the column cut off below
    return hot[..., :num_experts]


def ids_of(trace: Trace) -> Array:
    """Token ids int64 `[N]`, -1 where nobody kept them."""
    if trace.token_ids is None:
        return np.full(trace.num_tokens, -1, np.int64)
    return trace.token_ids.astype(np.int64)


def rows_of(ids: Array, known: Array) -> Array:
    """Where ids lie in an ascending list; its length for those that do not."""
    at = np.searchsorted(known, ids)
    there = at < len(known)
    there[there] = known[at[there]] == ids[there]
    return np.where(there, at, len(known))


def take(
    arrays: Mapping[str, Array], name: str, shape: tuple[int, ...], dtype: Any = np.float32
) -> Array:
    """One array of a saved state; -1 in `shape` stands for any length.

    Raises:
        CheckpointError: It is missing, of another shape or type, or not finite.
    """
    array = arrays.get(name)
    if array is None:
        raise CheckpointError(
            f"predictor: got no array {name!r}, got {sorted(arrays)}; train it again with this "
            "sluice"
        )
    fits = len(array.shape) == len(shape) and all(
        want in (-1, got) for got, want in zip(array.shape, shape, strict=True)
    )
    if not fits or array.dtype != np.dtype(dtype):
        raise CheckpointError(
            f"predictor: got {name} {array.dtype}{list(array.shape)}, expected "
            f"{np.dtype(dtype)}{list(shape)}"
        )
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        raise CheckpointError(f"predictor: got {name} with values that are not finite")
    return array


def take_routes(
    arrays: Mapping[str, Array], name: str, shape: tuple[int, ...], num_experts: int
) -> Array:
    """Routes of a saved state.

    Raises:
        CheckpointError: They do not fit, or name experts that there are not.
    """
    routes = take(arrays, name, shape, np.int16)
    if routes.size and (routes.min() < -1 or routes.max() >= num_experts):
        raise CheckpointError(
            f"predictor: got experts of {routes.min()} to {routes.max()} in {name}, expected -1 "
            f"to {num_experts - 1}"
        )
    return routes


def names_as_array(names: Sequence[str]) -> Array:
    """Texts as bytes of a JSON list, uint8: a saved state holds arrays alone."""
    return np.frombuffer(json.dumps(list(names)).encode(), np.uint8).copy()


def names_of_array(arrays: Mapping[str, Array], name: str) -> list[str]:
    """What `names_as_array` wrote.

    Raises:
        CheckpointError: It is missing, or no JSON list of texts.
    """
    try:
        found: Any = json.loads(take(arrays, name, (-1,), np.uint8).tobytes())
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"predictor: got no JSON in {name} ({error})") from error
    if not isinstance(found, list) or not all(isinstance(each, str) for each in found):
        raise CheckpointError(f"predictor: got {found!r:.80} in {name}, expected a list of names")
    return found
