"""Traces that others recorded: one array per request, checked by name, and ESFT folders."""

from __future__ import annotations

import gzip
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np

from sluice.errors import CheckpointError, ConfigError
from sluice.trace.trace import UNKNOWN, Array, Trace, TraceSequence, content_hash

_NPY_HEADER_BYTES = 4096


def from_arrays(
    experts: Sequence[Array],
    weights: Sequence[Array] | None = None,
    *,
    num_experts: int,
    num_layers: int | None = None,
    top_k: int | None = None,
    token_ids: Sequence[Array] | None = None,
    prompt_tokens: Sequence[int] | None = None,
    tasks: str | Sequence[str] = "",
    requests: Sequence[str] | None = None,
    model: str = "",
    source: str = "",
    own_text: bool | None = None,
) -> Trace:
    """A trace of one array per request, each checked by name.

    Args:
        experts: Integers `[tokens, layers, K]`, one array per request; -1 for none.
        weights: Floats of the same shapes, or None.
        num_experts: Experts of a layer.
        num_layers: What the arrays must have; None: what the first has.
        top_k: The same of K.
        token_ids: `[tokens]` per request, or None.
        prompt_tokens: How many tokens, the first, were the prompt; None: unknown.
        tasks: Of all requests, or of each.
        requests: Names; None: their numbers.
        model: Name and fingerprint of the model.
        source: Where it comes from.
        own_text: Whether the model wrote what follows the prompts.

    Raises:
        ConfigError: No requests, another number of layers or of experts a token, an expert that
            the layer does not have, an expert twice in one token, or lengths that do not agree.
    """
    if not len(experts):
        raise ConfigError("trace: got no requests, expected at least one")
    lengths = {
        "weights": weights,
        "token_ids": token_ids,
        "prompt_tokens": prompt_tokens,
        "tasks": None if isinstance(tasks, str) else tasks,
        "requests": requests,
    }
    for name, given in lengths.items():
        if given is not None and len(given) != len(experts):
            raise ConfigError(f"{name}: got {len(given)}, expected {len(experts)}, one per request")
    shape = experts[0].shape
    layers = num_layers or (shape[1] if len(shape) == 3 else None)
    per_token = top_k or (shape[2] if len(shape) == 3 else None)
    sequences: list[TraceSequence] = []
    start = 0
    for i, array in enumerate(experts):
        name = f"request {i}" if requests is None else f"request {requests[i]}"
        _check_request(name, array, layers, per_token, num_experts)
        ids = None if token_ids is None else np.asarray(token_ids[i])
        if ids is not None and ids.shape != array.shape[:1]:
            raise ConfigError(
                f"{name}: got {list(ids.shape)} token ids for {array.shape[0]} tokens"
            )
        if weights is not None and np.shape(weights[i]) != array.shape:
            raise ConfigError(
                f"{name}: got weights {list(np.shape(weights[i]))} for experts {list(array.shape)}"
            )
        prompt = UNKNOWN if prompt_tokens is None else int(prompt_tokens[i])
        if not UNKNOWN <= prompt <= array.shape[0]:
            raise ConfigError(f"{name}: got {prompt} of {array.shape[0]} tokens as its prompt")
        sequences.append(
            TraceSequence(
                start,
                array.shape[0],
                prompt,
                tasks if isinstance(tasks, str) else tasks[i],
                str(i) if requests is None else requests[i],
                content_hash(ids, array),
            )
        )
        start += array.shape[0]
    return Trace(
        experts=np.concatenate([array.astype(np.int16) for array in experts]),
        num_experts=num_experts,
        sequences=tuple(sequences),
        weights=None
        if weights is None
        else np.concatenate([np.asarray(w, dtype=np.float32) for w in weights]),
        token_ids=None
        if token_ids is None
        else np.concatenate([np.asarray(t, dtype=np.int32) for t in token_ids]),
        model=model,
        source=source,
        own_text=own_text,
    )


def import_esft_folder(folder: str | Path) -> Trace:
    """A folder with `meta.json`, `experts.npy.gz` and `weights.npy.gz`, as ESFT's scores come.

    `meta.json` names model, source, task, layers, experts_per_layer, top_k, weight_scale and
    sequences as {start, length}; experts are uint8 `[tokens, layers, K]`, weights uint16 times
    weight_scale, not renormalised over the K. Text and answers are the data set's, their border is
    unknown. Source: the routing of 2407.01906.

    Raises:
        CheckpointError: A file is missing, cut short, or not what `meta.json` says.
    """
    folder = Path(folder)
    meta = _read_json(folder / "meta.json")
    try:
        shape = (int(meta["tokens"]), int(meta["layers"]), int(meta["top_k"]))
        spans = [(int(s["start"]), int(s["length"])) for s in meta["sequences"]]
        num_experts, scale = int(meta["experts_per_layer"]), float(meta["weight_scale"])
        model, task, source = str(meta["model"]), str(meta["task"]), str(meta["source"])
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{folder / 'meta.json'}: got no usable {error}") from None
    experts = _read_array(folder / "experts.npy.gz", np.dtype("u1"), shape)
    weights = _read_array(folder / "weights.npy.gz", np.dtype("<u2"), shape) / scale
    if [start for start, _ in spans] != [0, *np.cumsum([n for _, n in spans])[:-1].tolist()] or (
        sum(length for _, length in spans) != shape[0]
    ):
        raise CheckpointError(
            f"{folder / 'meta.json'}: got sequences that do not cover {shape[0]} tokens one behind "
            "the other"
        )
    try:
        return from_arrays(
            [experts[start : start + length] for start, length in spans],
            [weights[start : start + length] for start, length in spans],
            num_experts=num_experts,
            tasks=task,
            requests=[f"{task}/{i}" for i in range(len(spans))],
            model=model,
            source=source,
            own_text=False,
        )
    except ConfigError as error:
        raise CheckpointError(f"{folder}: {error}") from None


def check_shape(name: str, array: Array, layers: int | None, top_k: int | None) -> None:
    """Refuses by name what is no `[tokens, layers, top_k]` of whole numbers, as `from_arrays`."""
    if array.ndim != 3 or array.dtype.kind not in "iu" or not array.shape[0]:
        raise ConfigError(
            f"{name}: got experts {array.dtype}{list(array.shape)}, expected whole numbers "
            "[tokens, layers, top-k], at least one token"
        )
    for what, got, expected in (
        ("layers", array.shape[1], layers),
        ("experts a token", array.shape[2], top_k),
    ):
        if expected is not None and got != expected:
            raise ConfigError(f"{name}: got {got} {what}, expected {expected}")


def _check_request(
    name: str, array: Array, layers: int | None, top_k: int | None, num_experts: int
) -> None:
    check_shape(name, array, layers, top_k)
    worst = int(array.max()) if array.max() >= num_experts else int(array.min())
    if not -1 <= worst < num_experts:
        token = int(np.argmax((array == worst).any(axis=(1, 2))))
        raise ConfigError(
            f"{name}: got expert {worst} in token {token}, expected one below {num_experts}, or -1"
        )
    ordered = np.sort(array, axis=-1)
    twice: Array = (ordered[..., 1:] == ordered[..., :-1]) & (ordered[..., 1:] >= 0)
    if twice.any():
        token, layer = (int(i) for i in np.argwhere(twice)[0][:2])
        raise ConfigError(
            f"{name}: got {array[token, layer].tolist()} in token {token}, layer {layer}, expected "
            "each expert once"
        )


def _read_json(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file}: got no readable JSON: {error}") from None
    if not isinstance(found, dict):
        raise CheckpointError(f"{file}: got {type(found).__name__}, expected an object")
    return cast("dict[str, Any]", found)


def _read_array(file: Path, dtype: np.dtype[Any], shape: tuple[int, ...]) -> Array:
    """A gzipped `.npy`; no more of it is unpacked than `shape` can need."""
    most = int(np.prod(shape)) * dtype.itemsize + _NPY_HEADER_BYTES
    try:
        with gzip.open(file) as packed:
            raw = packed.read(most + 1)
        array = np.load(io.BytesIO(raw), allow_pickle=False)
    except (OSError, EOFError, ValueError) as error:
        raise CheckpointError(f"{file}: got no whole gzipped .npy: {error}") from None
    if len(raw) > most or array.dtype != dtype or array.shape != shape:
        raise CheckpointError(
            f"{file}: got {array.dtype}{list(array.shape)}, expected {dtype}{list(shape)} as "
            "meta.json says"
        )
    return array
