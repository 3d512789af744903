"""What observers see of a model that runs: forwards as steps, and each layer's routing in them.

A recorder is an observer, and what runs a predictor (`sluice.foresight`) is one. While nobody
observes, a forward costs one test of an attribute a layer; with the first observer come two hooks
on the model, which go with the last.

A row of a batch is a request. A forward without a cache begins new ones, and so does one whose
cache is empty; a forward with a cache that was seen continues its requests. Nothing on a cache is
changed. One that somebody else touched between two forwards, to reorder or repeat its rows or to
cut it back (beam search, assisted decoding), is given up: its requests are taken back by `forget`,
and whatever it runs later is a step of which `traceable` is False, as are the steps of a
`generate` with beams, of continuous batching, and with a past that nobody saw.
"""

from __future__ import annotations

import functools
import inspect
import threading
import weakref
from collections.abc import Generator, Iterable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from sluice.hf.cache_rows import (
    Known,
    cache_in,
    cache_of,
    is_empty,
    is_trackable,
    keys_of,
    length_of,
)
from sluice.hf.fingerprint import model_fingerprint
from sluice.hf.site import ExpertSite
from sluice.hf.steps import Observer, Step


@dataclass(slots=True)
class _Open:
    """A forward that runs on this thread."""

    module: nn.Module
    step: Step
    cache: Any
    known: Known | None
    rows: int
    layers: int = 0
    rows_fit: bool = True


class _Here(threading.local):
    forward: _Open | None = None
    generating: bool = False
    moves_rows: bool = False
    ends: frozenset[int] = frozenset()


class Tap:
    """The observers of one model.

    Args:
        model: Whose forwards are steps. Held weakly.
        session: Which runs its experts. Held weakly.
        sites: Its experts modules, in the order of the session's layers.

    Attributes:
        task: What requests that begin from now on are called: one name, or one a row.
    """

    def __init__(self, model: nn.Module, session: Any, sites: Sequence[ExpertSite]) -> None:
        self.task: str | Sequence[str] = ""
        self._model = weakref.ref(model)
        self._session = weakref.ref(session)
        self._sites = tuple(sites)
        self._observers: tuple[Observer, ...] = ()
        self._handles: list[Any] = []
        self._caches: weakref.WeakKeyDictionary[Any, Known] = weakref.WeakKeyDictionary()
        self._given_up: weakref.WeakSet[Any] = weakref.WeakSet()
        self._here = _Here()
        self._lock = threading.Lock()
        self._steps = 0
        self._requests = 0

    @property
    def active(self) -> bool:
        """Whether anybody observes."""
        return bool(self._observers)

    def fingerprint(self) -> str:
        """Names the model, as `model_fingerprint` does; "" when it is gone."""
        model = self._model()
        return "" if model is None else model_fingerprint(model, self._sites)

    def add(self, observer: Observer) -> None:
        """Has `observer` called from the next forward on."""
        model, session = self._model(), self._session()
        if model is None or session is None:
            return
        with self._lock:
            if not self._observers:
                # Not to be traced: what they note is of the run, not of the graph.
                before: Any = torch.compiler.disable(self._before)
                after: Any = torch.compiler.disable(self._after)
                for module in _callers(model, [site.name for site in self._sites]):
                    self._handles += [
                        module.register_forward_pre_hook(before, with_kwargs=True),
                        module.register_forward_hook(after, with_kwargs=True, always_call=True),
                    ]
            self._observers = (*self._observers, observer)
            session.routed = self._routed if self._sees_layers() else None

    def remove(self, observer: Observer) -> None:
        """Leaves `observer` alone from now on; without the last, the model is as it was."""
        self.settle()
        with self._lock:
            self._observers = tuple(o for o in self._observers if o is not observer)
            session = self._session()
            if not self._observers:
                self._release()
            elif session is not None and not self._sees_layers():
                session.routed = None

    def _sees_layers(self) -> bool:
        return any(observer.sees_layers for observer in self._observers)

    def close(self) -> None:
        """Takes every observer off."""
        with self._lock:
            self._observers = ()
            self._release()

    def settle(self) -> None:
        """Gives up caches that were touched since their last forward."""
        for cache, known in list(self._caches.items()):
            if not known.untouched(cache) and not is_empty(cache, known):
                self._give_up(cache)

    @contextmanager
    def generating(self, ends: Iterable[int], *, moves_rows: bool) -> Generator[None]:
        """Marks the forwards of a `generate`.

        Args:
            ends: Ids from which on a row of a batch is filling, until all rows have ended.
            moves_rows: Whether rows will change places.
        """
        here = self._here
        before = here.generating, here.moves_rows, here.ends
        here.generating, here.moves_rows, here.ends = True, moves_rows, frozenset(ends)
        try:
            yield
        finally:
            here.generating, here.moves_rows, here.ends = before
            self.settle()

    def _before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        here = self._here
        if here.forward is not None:
            if here.forward.module is not module:
                return  # a part of the model that runs
            self._end(here.forward, complete=False)  # it was interrupted, past torch's hooks
        here.forward = self._open(module, args, kwargs)
        if here.forward is not None:
            for observer in self._observers:
                observer.begin_step(here.forward.step)

    def _after(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> None:
        forward = self._here.forward
        if forward is None or forward.module is not module:
            return
        self._here.forward = None
        if output is not None and forward.known is not None:
            cache = cache_of(output) if forward.cache is None else forward.cache
            if is_trackable(cache):
                known = forward.known
                first = known.length == 0
                known.length += forward.step.tokens
                known.decoding |= not forward.step.prompt
                known.keys = None if (keys := keys_of(cache)) is None else weakref.ref(keys)
                if first:
                    known.tells_length = length_of(cache) == known.length
                    self._caches[cache] = known
        self._end(forward, complete=output is not None)

    def _routed(
        self, layer: int, hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor
    ) -> None:
        forward = self._here.forward
        if forward is None:
            self._note("routing_outside_of_forwards")
            return
        step = forward.step
        forward.layers += 1
        forward.rows_fit &= len(ids) == forward.rows
        for observer in self._observers:
            observer.routed(step, layer, hidden, ids, weights)

    def _open(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> _Open | None:
        if args:
            kwargs = {**dict(zip(_parameters(type(module)), args, strict=False)), **kwargs}
        ids = kwargs.get("input_ids")
        rows = kwargs.get("inputs_embeds") if ids is None else ids
        if not isinstance(rows, torch.Tensor) or rows.ndim < 2:
            self._note("forwards_of_unknown_input")
            return None
        batch, tokens = int(rows.shape[0]), int(rows.shape[1])
        cache = cache_in(kwargs)
        known, begins, traceable = self._requests_of(cache, batch)
        real, understood = _real_tokens(kwargs.get("attention_mask"), cache, tokens)
        packed = kwargs.get("cu_seq_lens_q") is not None  # several texts in one row
        traceable &= understood and not (packed or self._here.moves_rows)
        if not traceable:
            self._note("untraceable_forwards")
        with self._lock:
            index = self._steps
            self._steps += 1
        step = Step(
            index=index,
            requests=known.requests,
            tokens=tokens,
            begins=begins,
            prompt=(begins and traceable) or (tokens > 1 and not known.decoding),
            traceable=traceable,
            generated=self._here.generating,
            token_ids=ids,
            real=real,
            ends=self._here.ends if batch > 1 else frozenset(),
            tasks=known.tasks,
        )
        return _Open(module, step, cache, known if traceable else None, batch * tokens)

    def _requests_of(self, cache: Any, batch: int) -> tuple[Known, bool, bool]:
        """Who runs: (requests, whether they begin, whether they are known from the beginning)."""
        if cache is None:
            return self._new(batch), True, True
        if not is_trackable(cache):
            return self._new(batch), True, False
        known = self._caches.get(cache)
        if known is None:
            fresh = length_of(cache) == 0 and cache not in self._given_up
            return self._new(batch), True, fresh
        if is_empty(cache, known):  # reset, to serve again
            return self._new(batch), True, True
        if len(known.requests) != batch or not known.untouched(cache):
            self._give_up(cache)
            return self._new(batch), True, False
        return known, False, True

    def _new(self, batch: int) -> Known:
        with self._lock:
            first = self._requests
            self._requests += batch
        task = self.task
        tasks = (task,) * batch if isinstance(task, str) else tuple(task)
        return Known(
            np.arange(first, first + batch, dtype=np.int64),
            tasks if len(tasks) == batch else ("",) * batch,
        )

    def _give_up(self, cache: Any) -> None:
        known = self._caches.pop(cache, None)
        self._given_up.add(cache)
        if known is not None:
            self._note("requests_with_moved_rows", len(known.requests))
            for observer in self._observers:
                observer.forget(known.requests)

    def _end(self, forward: _Open, *, complete: bool) -> None:
        whole = not self._sees_layers() or forward.layers == len(self._sites)
        complete = complete and forward.rows_fit and whole
        if not complete:
            self._note("incomplete_forwards")
            if forward.known is not None:
                for observer in self._observers:
                    observer.forget(forward.step.requests)
        for observer in self._observers:
            observer.end_step(forward.step, complete=complete)

    def _note(self, name: str, count: int = 1) -> None:
        session = self._session()
        if session is not None:
            session.note(name, count)

    def _release(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self._caches.clear()
        self._given_up.clear()
        self._here.forward = None
        session = self._session()
        if session is not None:
            session.routed = None


def _callers(model: nn.Module, site_names: Sequence[str]) -> list[nn.Module]:
    """Modules whose call runs every site, outermost first: the model, its decoder, its text part.

    A user may call any of them.
    """
    callers = [model]
    paths = [name.split(".") for name in site_names]
    for parts in zip(*paths, strict=False):
        if len(set(parts)) > 1:
            break
        child = callers[-1].get_submodule(parts[0])
        if isinstance(child, nn.ModuleList):
            break
        callers.append(child)
    return callers


def _real_tokens(mask: Any, cache: Any, tokens: int) -> tuple[torch.Tensor | None, bool]:
    """(which of the newest `tokens` are no padding, None: all; whether that could be told)."""
    if isinstance(mask, dict):
        mask = mask.get("full_attention")
    if mask is None or (isinstance(mask, torch.Tensor) and mask.ndim == 2 and tokens == 1):
        return None, True
    if not isinstance(mask, torch.Tensor):
        return None, False
    if mask.ndim == 2 and mask.shape[1] >= tokens:
        return mask[:, -tokens:].bool(), True
    if mask.ndim == 4:  # what the newest token of each row sees
        past = 0 if cache is None else length_of(cache)
        seen = mask[:, 0, -1, past : past + tokens]
        if seen.shape[1] == tokens:
            return (seen if seen.dtype == torch.bool else seen == 0), True
    return None, False


@functools.cache
def _parameters(kind: type) -> tuple[str, ...]:
    """Names of what a module's forward takes, in order."""
    return tuple(inspect.signature(kind.forward).parameters)[1:]  # pyright: ignore[reportAttributeAccessIssue]
