"""Traces on disk: one safetensors file each, `NAME.trace.safetensors`.

Tensors, N tokens (rows of a sequence are consecutive), S MoE layers, K experts a token:

| name | type | content |
| --- | --- | --- |
| `experts` | uint8 `[N, S, K]`, 255 none; int16, -1 none, for more than 255 | heaviest first |
| `weights` | uint16 `[N, S, K]`, over `weight_scale`; float16 if one is negative | optional |
| `token_ids` | int32 `[N]`, the token that entered | optional, when asked for |
| `steps` | int64 `[N]`, the forward in which a token ran | optional; absent: each alone |
| `hidden` | float16 `[N, S, H]`, what entered each layer's experts | optional, when asked for |

Metadata: `format` = "sluice.trace" and `header`, a JSON object: `schema` 1, `num_experts`, `model`,
`source`, `own_text`, `sequences` as a list of [length, prompt_tokens (-1: unknown), task, request,
content], and for weights `weight_scale` and `weight_error`, the largest absolute difference that
storing them made. Storing what was loaded changes nothing further. `content` is `content_hash` of a
sequence's rows; `load` computes it again, and refuses a file in which the two differ.

A trace tells what was asked and answered: files are readable by their owner alone, and appear
whole or not at all.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np

from sluice import _core
from sluice.errors import CheckpointError, ConfigError
from sluice.text import format_bytes
from sluice.trace.trace import UNKNOWN, Array, Trace, TraceSequence, content_hash

SUFFIX = ".trace.safetensors"
MAX_BYTES = "1GiB"
_FORMAT = "sluice.trace"
_SCHEMA = 1
_NONE = 255
_STEPS_OF_WEIGHT = 65535
_RANKS = {"experts": 3, "weights": 3, "token_ids": 1, "steps": 1, "hidden": 3}
_TYPES = {
    "experts": ("uint8", "int16"),
    "weights": ("uint16", "float16"),
    "token_ids": ("int32",),
    "steps": ("int64",),
    "hidden": ("float16",),
}


def save(
    trace: Trace,
    path: str | os.PathLike[str],
    *,
    max_bytes: int | str = MAX_BYTES,
    weight_scale: float | None = None,
) -> Path:
    """Writes one trace, readable by its owner alone; an old file of that name is replaced.

    Args:
        trace: What to write. Sequences without a content hash get theirs.
        path: Ends in `.trace.safetensors`, which is added where it is missing.
        max_bytes: What the file may take, bytes or a size.
        weight_scale: Steps of a weight of 1: 65535 where none is larger, else as many as fit.
            Weights that are multiples of 1/10000 are kept exactly by 10000.

    Returns:
        The file's path.

    Raises:
        ConfigError: It would be larger than `max_bytes`, a sequence has another content than its
            hash says, or the scale does not fit the weights.
    """
    target = Path(path)
    if not target.name.endswith(SUFFIX):
        target = target.with_name(target.name + SUFFIX)
    sequences = [_hashed(trace, sequence) for sequence in trace.sequences]
    tensors, packing = _pack(trace, weight_scale)
    header = {
        "schema": _SCHEMA,
        "num_experts": trace.num_experts,
        "model": trace.model,
        "source": trace.source,
        "own_text": trace.own_text,
        **packing,
        "sequences": [[s.length, s.prompt_tokens, s.task, s.request, s.content] for s in sequences],
    }
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":"))
    size, cap = sum(t.nbytes for t in tensors.values()) + len(text), bytes_of(max_bytes)
    if size > cap:
        raise ConfigError(
            f"{target.name}: got a trace of {format_bytes(size)}, expected at most "
            f"{format_bytes(cap)}; raise max_bytes, or keep less (hidden states take most)"
        )
    _write(target, tensors, {"format": _FORMAT, "header": text})
    return target


def load(path: str | os.PathLike[str]) -> Trace:
    """Reads a trace, believing nothing that the file says of itself.

    Raises:
        CheckpointError: No such file, none of ours, cut short, a schema of a newer sluice, shapes
            or types that do not fit, an expert that the layer does not have, or a sequence whose
            content is not what its hash says. The message names the file and the lie.
    """
    file = Path(path)
    tensors, metadata = _read(file)
    if metadata.get("format") != _FORMAT:
        raise CheckpointError(
            f"{file}: got format {metadata.get('format')!r}, expected {_FORMAT!r}; "
            "`sluice trace import` reads other formats"
        )
    header = _header(file, metadata)
    for name, tensor in tensors.items():
        if name not in _TYPES:
            raise CheckpointError(
                f"{file}: got a tensor {name!r}, expected only {', '.join(_TYPES)}"
            )
        if tensor.dtype.name not in _TYPES[name] or tensor.ndim != _RANKS[name]:
            raise CheckpointError(
                f"{file}: got {name} as {tensor.dtype.name}{list(tensor.shape)}, expected "
                f"{' or '.join(_TYPES[name])} with {_RANKS[name]} dimensions"
            )
    if "experts" not in tensors:
        raise CheckpointError(f"{file}: got no experts, expected a tensor of that name")
    try:
        trace = Trace(
            experts=_unpack_experts(tensors["experts"], header["num_experts"]),
            num_experts=header["num_experts"],
            sequences=_sequences(header["sequences"]),
            weights=_unpack_weights(tensors.get("weights"), header.get("weight_scale")),
            token_ids=tensors.get("token_ids"),
            steps=tensors.get("steps"),
            hidden=tensors.get("hidden"),
            model=header["model"],
            source=header["source"],
            own_text=header["own_text"],
        )
    except (ConfigError, TypeError, ValueError, OverflowError) as error:
        raise CheckpointError(f"{file}: {error}; the file is damaged or was made to lie") from None
    for position, sequence in enumerate(trace):
        if sequence.content != _content_of(trace, sequence):
            raise CheckpointError(
                f"{file}: sequence {position}: got content {sequence.content[:16]!r}…, expected "
                f"{_content_of(trace, sequence)[:16]!r}… of its rows; its tokens or its name were "
                "changed"
            )
    return trace


def _content_of(trace: Trace, sequence: TraceSequence) -> str:
    ids = None if trace.token_ids is None else trace.token_ids[sequence.rows]
    return content_hash(ids, trace.experts[sequence.rows])


def _hashed(trace: Trace, sequence: TraceSequence) -> TraceSequence:
    content = _content_of(trace, sequence)
    if sequence.content not in ("", content):
        raise ConfigError(
            f"trace: got a sequence at row {sequence.start} with content "
            f"{sequence.content[:16]!r}…, expected {content[:16]!r}… of its rows; a trace whose "
            "token ids were taken out needs new hashes: content=''"
        )
    return replace(sequence, content=content)


def _pack(trace: Trace, scale: float | None) -> tuple[dict[str, Array], dict[str, float]]:
    """The tensors as the file holds them, and what the header says of the weights."""
    small = trace.num_experts <= _NONE
    experts = np.where(trace.experts < 0, _NONE, trace.experts) if small else trace.experts
    tensors = {"experts": experts.astype("u1" if small else "<i2")}
    packing: dict[str, float] = {}
    if trace.weights is not None:
        tensors["weights"], packing = _pack_weights(trace.weights, scale)
    for name, kind in (("token_ids", "<i4"), ("steps", "<i8"), ("hidden", "<f2")):
        array = getattr(trace, name)
        if array is not None:
            tensors[name] = array.astype(kind)
    return {name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}, packing


def _pack_weights(weights: Array, scale: float | None) -> tuple[Array, dict[str, float]]:
    exact = weights.astype(np.float64)
    least, most = (float(exact.min()), float(exact.max())) if exact.size else (0.0, 0.0)
    if not np.isfinite([least, most]).all():
        raise ConfigError("trace: got weights that are not finite, expected numbers")
    if least < 0:
        if scale is not None:
            raise ConfigError(
                f"weight_scale: got {scale} for weights down to {least}, expected none"
            )
        packed = weights.astype("<f2")
        return packed, {"weight_error": float(np.abs(packed.astype(np.float64) - exact).max())}
    scale = scale or _STEPS_OF_WEIGHT / max(1.0, most)
    if not 0 < scale * max(most, 1e-9) < _STEPS_OF_WEIGHT + 0.5:
        raise ConfigError(
            f"weight_scale: got {scale} for weights up to {most}, expected at most "
            f"{_STEPS_OF_WEIGHT / most:g}"
        )
    packed = np.rint(exact * scale).astype("<u2")
    error = float(np.abs(packed / scale - exact).max()) if exact.size else 0.0
    return packed, {"weight_scale": float(scale), "weight_error": error}


def _unpack_experts(packed: Array, num_experts: object) -> Array:
    if type(num_experts) is not int:
        raise ConfigError(f"got num_experts {num_experts!r}, expected a whole number")
    experts = packed.astype(np.int16)
    if packed.dtype == np.uint8:
        if num_experts > _NONE:
            raise ConfigError(f"got experts as uint8 and {num_experts} of them, expected int16")
        experts[packed == _NONE] = -1
    return experts


def _unpack_weights(packed: Array | None, scale: object) -> Array | None:
    if packed is None:
        return None
    if packed.dtype == np.float16:
        weights = packed.astype(np.float32)
    elif isinstance(scale, int | float) and 0 < scale < np.inf:
        weights = (packed / np.float64(scale)).astype(np.float32)
    else:
        raise ConfigError(f"got weight_scale {scale!r}, expected a number above 0")
    if not np.isfinite(weights).all():
        raise ConfigError("got weights that are not finite, expected numbers")
    return weights


def _header(file: Path, metadata: Mapping[str, str]) -> dict[str, Any]:
    try:
        header = json.loads(metadata.get("header", ""))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{file}: got a header that is no JSON: {error}") from None
    if not isinstance(header, dict):
        raise CheckpointError(
            f"{file}: got a header of {type(header).__name__}, expected an object"
        )
    if header.get("schema") != _SCHEMA:
        raise CheckpointError(
            f"{file}: got schema {header.get('schema')!r}, expected {_SCHEMA}; a newer sluice may "
            "read it"
        )
    kinds: dict[str, tuple[type, ...]] = {
        "num_experts": (int,),
        "model": (str,),
        "source": (str,),
        "own_text": (bool, type(None)),
        "sequences": (list,),
    }
    for key, allowed in kinds.items():
        if type(header.get(key)) not in allowed or key not in header:
            raise CheckpointError(
                f"{file}: got {key} = {header.get(key)!r} in the header, expected "
                f"{' or '.join(kind.__name__ for kind in allowed)}"
            )
    return cast("dict[str, Any]", header)


def _sequences(rows: list[Any]) -> tuple[TraceSequence, ...]:
    sequences: list[TraceSequence] = []
    start = 0
    for position, row in enumerate(rows):
        kinds = [type(field) for field in row] if isinstance(row, list) else []
        if kinds != [int, int, str, str, str]:
            raise ConfigError(
                f"got sequence {position} as {str(row)[:80]}, expected [length, prompt_tokens, "
                "task, request, content]"
            )
        length, prompt, task, request, content = row
        if not UNKNOWN <= prompt <= length:
            raise ConfigError(
                f"got sequence {position} with {prompt} of {length} tokens as its prompt"
            )
        sequences.append(TraceSequence(start, length, prompt, task, request, content))
        start += length
    return tuple(sequences)


def _read(file: Path) -> tuple[dict[str, Array], dict[str, str]]:
    from safetensors import SafetensorError, safe_open

    if not file.is_file():
        raise CheckpointError(f"{file}: got no such file, expected a trace (NAME{SUFFIX})")
    try:
        with safe_open(str(file), framework="numpy") as opened:
            metadata = opened.metadata() or {}
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    except (SafetensorError, TypeError, ValueError) as error:  # the latter two: an unknown type
        raise CheckpointError(
            f"{file}: got no whole safetensors file: {error}; it was cut short or is none"
        ) from None
    return tensors, metadata


def _write(target: Path, tensors: dict[str, Array], metadata: dict[str, str]) -> None:
    from safetensors.numpy import save_file

    folder = target.resolve().parent
    if not folder.is_dir():
        raise ConfigError(f"{target}: got a folder that is not there; make it first")
    # In a folder of its own, which nobody else may enter, until it is whole.
    with tempfile.TemporaryDirectory(prefix=".trace-", dir=folder) as private:
        partial = Path(private) / "partial"
        save_file(tensors, str(partial), metadata)
        partial.chmod(0o600)
        with partial.open("rb") as written:
            os.fsync(written.fileno())
        partial.replace(target)


def bytes_of(size: int | str) -> int:
    """`max_bytes` as a number; ConfigError when it is no size."""
    kind, amount = _core.parse_size(size)
    if kind != "bytes" or amount <= 0:
        raise ConfigError(f'max_bytes: got {size!r}, expected bytes or a size such as "1GiB"')
    return int(amount)
