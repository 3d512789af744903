"""Records the routing of a model that runs, as an observer of its forwards.

What is kept is true of every token it names: rows of padding, and what a batch of `generate` runs
of a row that has ended, are left out; a request whose rows can no longer be told (beam search,
assisted decoding), whose forward failed, or whose beginning nobody saw, is left out whole. The
session counts each, as `requests_with_moved_rows`, `incomplete_forwards`, `untraceable_forwards`.
Without a cache (`use_cache=False`) every forward is a request of its own, for it runs all of the
text again.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np

from sluice.errors import ConfigError
from sluice.hf.steps import Observer, Step
from sluice.trace.files import bytes_of, save
from sluice.trace.trace import Array, Trace, TraceSequence, content_hash

if TYPE_CHECKING:
    import torch

    from sluice.session import Session

_STEPS_AT_ONCE = 128
_PENDING_BYTES = 8 << 20
_BYTES_OF_ROUTE = 6  # int16 and float32
_BYTES_OF_ROW = 21  # step, request, id, phase
_BYTES_OF_REQUEST = 256  # its names and hash, here and in a file's header
_BYTES_OF_HEADER = 4096


@dataclass(slots=True)
class _Forward:
    """What one forward routed, layer by layer; then as arrays on the CPU."""

    step: Step
    ids: list[torch.Tensor] = field(default_factory=list)
    weights: list[torch.Tensor] = field(default_factory=list)
    hidden: list[torch.Tensor] = field(default_factory=list)
    token_ids: torch.Tensor | None = None
    real: torch.Tensor | None = None


@dataclass(slots=True)
class _Request:
    task: str
    generated: bool


class Recorder(Observer):
    """A context manager: what runs within it is in `trace()`.

    Args: those of `Session.record`.
    """

    def __init__(
        self,
        session: Session,
        path: str | os.PathLike[str] | None = None,
        *,
        token_ids: bool = False,
        hidden: bool = False,
        task: str | Sequence[str] = "",
        max_bytes: int | str = "1GiB",
    ) -> None:
        if session.tap is None:
            raise ConfigError(
                "record: got a session without a model, expected that of an offloaded model"
            )
        self._session = session
        self._tap = session.tap
        self._path = path
        self._keep_ids = token_ids
        self._keep_hidden = hidden
        self._max_bytes = bytes_of(max_bytes)
        self._first_task = task
        self._lock = threading.Lock()
        self._open: dict[int, _Forward] = {}
        self._pending: list[_Forward] = []
        self._pending_bytes = 0
        self._bytes = 0
        self._full = False
        self._requests: dict[int, _Request] = {}
        self._forgotten: set[int] = set()
        self._ended: set[int] = set()
        self._chunks: list[dict[str, Array]] = []
        store = session.store
        self._experts = [int(store.layer(i)["num_experts"]) for i in range(store.num_layers)]

    @property
    def task(self) -> str | Sequence[str]:
        """What requests that begin from now on are called: one name, or one a row of the batch."""
        return self._tap.task

    @task.setter
    def task(self, task: str | Sequence[str]) -> None:
        self._tap.task = task

    @property
    def bytes_kept(self) -> int:
        """Bytes of what was recorded so far."""
        return self._bytes

    def __enter__(self) -> Recorder:
        self._task_before = self._tap.task
        self._tap.task = self._first_task
        self._tap.add(self)
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._tap.remove(self)
        self._tap.task = self._task_before
        if self._path is None:
            return
        try:
            save(self.trace(), self._path, max_bytes=self._max_bytes + _BYTES_OF_HEADER)
        except ConfigError:
            if exc is None:  # what ended the block is the news, not that it left nothing
                raise

    def begin_step(self, step: Step) -> None:
        """Opens a forward."""
        if not step.traceable:
            return
        with self._lock:
            if self._full:
                self._session.note("trace_truncated")
                return
            self._open[step.index] = _Forward(step)

    def routed(
        self,
        step: Step,
        layer: int,
        hidden: torch.Tensor,
        ids: torch.Tensor,
        weights: torch.Tensor,
    ) -> None:
        """Keeps one layer's routing where it lies."""
        forward = self._open.get(step.index)
        if forward is None:
            return
        forward.ids.append(ids)
        forward.weights.append(weights)
        if self._keep_hidden:
            forward.hidden.append(hidden)

    def end_step(self, step: Step, *, complete: bool) -> None:
        """Brings one forward's routing over, once."""
        forward = self._open.pop(step.index, None)
        if forward is None or not complete:
            return
        rows = len(step.requests) * step.tokens
        layers, top_k = len(forward.ids), max(ids.shape[1] for ids in forward.ids)
        width = forward.hidden[0].shape[1] if forward.hidden else 0
        size = rows * (_BYTES_OF_ROW + layers * (_BYTES_OF_ROUTE * top_k + 2 * width))
        size += _BYTES_OF_REQUEST * len(step.requests) if step.begins else 0
        with self._lock:
            if self._full or self._bytes + size > self._max_bytes:
                self._full = True
                self._session.note("trace_truncated")
                return
            self._bytes += size
            self._pending_bytes += size
            if step.begins:
                for request, task in zip(step.requests.tolist(), step.tasks, strict=True):
                    self._requests[request] = _Request(task, step.generated)
            self._pending.append(_brought_over(forward))
            if len(self._pending) >= _STEPS_AT_ONCE or self._pending_bytes > _PENDING_BYTES:
                self._flush()

    def forget(self, requests: Array) -> None:
        """Leaves these requests out."""
        with self._lock:
            self._forgotten.update(requests.tolist())

    def trace(self) -> Trace:
        """What was recorded so far; what is kept does not change by asking.

        Raises:
            ConfigError: Nothing was, with the reasons that were counted.
        """
        self._tap.settle()
        with self._lock:
            self._flush()
            chunks = list(self._chunks)
            forgotten = set(self._forgotten)
            requests = dict(self._requests)
        whole = {name: np.concatenate([c[name] for c in chunks]) for name in (chunks or [{}])[0]}
        if chunks:
            kept = ~np.isin(whole["requests"], list(forgotten))
            order = np.argsort(whole["requests"][kept], kind="stable")
            whole = {name: array[kept][order] for name, array in whole.items()}
        if not chunks or not len(whole["requests"]):
            raise ConfigError(
                f"trace: got no tokens recorded ({self._reasons()}), expected a forward of the "
                "model within the block"
            )
        return self._assemble(whole, requests)

    def _assemble(self, whole: dict[str, Array], requests: dict[int, _Request]) -> Trace:
        numbers, starts, lengths = np.unique(
            whole["requests"], return_index=True, return_counts=True
        )
        ids: Array | None = whole.get("token_ids")
        if ids is not None and (ids < 0).any():
            ids = None  # some were given as embeddings: half of a text names nothing
        sequences: list[TraceSequence] = []
        for number, start, length in zip(
            numbers.tolist(), starts.tolist(), lengths.tolist(), strict=True
        ):
            rows = slice(start, start + length)
            prompt = whole["prompt"][rows]
            sequences.append(
                TraceSequence(
                    start,
                    length,
                    # A later prompt of the same conversation is not its beginning.
                    int(length if prompt.all() else np.argmin(prompt)),
                    requests[number].task,
                    f"request {number}",
                    content_hash(None if ids is None else ids[rows], whole["experts"][rows]),
                )
            )
        generated = all(requests[number].generated for number in numbers.tolist())
        from sluice import _core

        return Trace(
            experts=whole["experts"],
            num_experts=max(self._experts),
            sequences=tuple(sequences),
            weights=whole["weights"],
            token_ids=ids,
            steps=whole["steps"],
            hidden=whole.get("hidden"),
            model=self._session.fingerprint,
            source=f"recorded by sluice {_core.version()}",
            own_text=True if generated else None,
        )

    def _flush(self) -> None:
        """Turns forwards into rows of arrays, those that are tokens of a text."""
        pending, self._pending, self._pending_bytes = self._pending, [], 0
        if not pending:
            return
        kept = np.concatenate([self._kept_rows(forward) for forward in pending])
        counts = [len(forward.step.requests) * forward.step.tokens for forward in pending]

        def per_row(values: list[int]) -> Array:
            return np.repeat(np.array(values), counts)[kept]

        chunk = self._routes(pending, kept)
        chunk["steps"] = per_row([forward.step.index for forward in pending])
        chunk["prompt"] = per_row([forward.step.prompt for forward in pending])
        chunk["requests"] = np.concatenate(
            [np.repeat(forward.step.requests, forward.step.tokens) for forward in pending]
        )[kept]
        self._chunks.append(chunk)

    def _routes(self, pending: list[_Forward], kept: Array) -> dict[str, Array]:
        """Routes of all rows that are kept, heaviest first, and what else was asked for."""

        def rows(kind: str, dtype: Any, fill: float) -> Array:
            return np.concatenate([_by_row(getattr(f, kind), dtype, fill) for f in pending])[kept]

        experts = rows("ids", np.int16, -1)
        weights = rows("weights", np.float32, 0.0)
        for layer, most in enumerate(self._experts):
            here = experts[:, layer]
            here[(here < 0) | (here >= most)] = -1
        # Not every router sorts. What is no expert weighs nothing, and goes last.
        weights[experts < 0] = 0
        keys = np.where(experts < 0, np.inf, -weights)
        if (np.diff(keys, axis=-1) < 0).any():
            order = np.argsort(keys, axis=-1, kind="stable")
            experts = np.take_along_axis(experts, order, axis=-1)
            weights = np.take_along_axis(weights, order, axis=-1)
        routes = {"experts": experts, "weights": weights}
        if self._keep_hidden:
            limit = float(np.finfo(np.float16).max)
            states = rows("hidden", np.float32, 0.0)
            routes["hidden"] = np.clip(states, -limit, limit).astype(np.float16)
        if self._keep_ids:
            routes["token_ids"] = np.concatenate([_ids_of(f) for f in pending])[kept]
        return routes

    def _kept_rows(self, forward: _Forward) -> Array:
        """Which of the step's rows are tokens of a text that goes on."""
        step = forward.step
        rows = len(step.requests) * step.tokens
        kept = np.ones(rows, dtype=bool)
        if forward.real is not None:
            kept &= forward.real.numpy().reshape(-1)
        if step.ends and not step.prompt and step.tokens == 1 and forward.token_ids is not None:
            for row, (request, token) in enumerate(
                zip(step.requests.tolist(), forward.token_ids.reshape(-1).tolist(), strict=True)
            ):
                if token in step.ends:
                    self._ended.add(request)
                kept[row] &= request not in self._ended
        return kept

    def _reasons(self) -> str:
        counted = self._session.stats().degradations
        reasons = [
            f"{name} {counted[name]}"
            for name in (
                "trace_truncated",
                "requests_with_moved_rows",
                "untraceable_forwards",
                "incomplete_forwards",
                "forwards_of_unknown_input",
                "routing_outside_of_forwards",
            )
            if counted.get(name)
        ]
        return ", ".join(reasons) or "no forward ran"


def record(model: Any, path: str | os.PathLike[str] | None = None, **options: Any) -> Recorder:
    """Records an offloaded model: `with sluice.trace.record(model) as recorder: …`.

    Args:
        model: One that sluice offloads, by any of the three ways in.
        path: Where the trace is saved when the block ends.
        options: Those of `Session.record`.

    Raises:
        ConfigError: The model is not offloaded.
    """
    session = getattr(model, "sluice", None)
    if session is None:
        raise ConfigError(
            f"record: got {type(model).__name__}, which is not offloaded; sluice.offload(model) or "
            "sluice.from_pretrained first"
        )
    return session.record(path, **options)


def _brought_over(forward: _Forward) -> _Forward:
    """The same with tensors of the CPU that nobody else writes: one copy of each kind."""
    import torch

    step = forward.step

    def stacked(tensors: list[Any], dtype: torch.dtype | None = None) -> list[Any]:
        tensors = [tensor.detach() if tensor.requires_grad else tensor for tensor in tensors]
        if len({tensor.shape for tensor in tensors}) > 1:
            return [tensor.to("cpu", dtype or tensor.dtype, copy=True) for tensor in tensors]
        whole = torch.stack(tensors)
        return [whole.to("cpu", dtype or whole.dtype)]

    forward.ids = stacked(forward.ids)
    forward.weights = stacked(forward.weights, torch.float32)
    forward.hidden = stacked(forward.hidden, torch.float32) if forward.hidden else []
    if step.token_ids is not None:
        forward.token_ids = step.token_ids.to("cpu", copy=True)
    if step.real is not None:
        forward.real = step.real.to("cpu", copy=True)
    return forward


def _by_row(tensors: list[Any], dtype: Any, fill: float) -> Array:
    """`[rows, layers, K]` of one stack `[layers, rows, K]`, or of layers whose K differ."""
    if len(tensors) == 1 and tensors[0].ndim == 3:
        return np.ascontiguousarray(tensors[0].numpy().transpose(1, 0, 2)).astype(dtype)
    width = max(tensor.shape[1] for tensor in tensors)
    out = np.full((tensors[0].shape[0], len(tensors), width), fill, dtype=dtype)
    for layer, tensor in enumerate(tensors):
        out[:, layer, : tensor.shape[1]] = tensor.numpy()
    return out


def _ids_of(forward: _Forward) -> Array:
    """int32 `[rows]`; -1 where the model was given embeddings."""
    if forward.token_ids is None:
        return np.full(len(forward.step.requests) * forward.step.tokens, -1, dtype=np.int32)
    return forward.token_ids.numpy().reshape(-1).astype(np.int32)
