"""Who is running: what a predictor knows of each request while a model decodes."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sluice.predict.protocol import RoutingEvent

Array = NDArray[Any]

MAX_REQUESTS = 256
"""Requests that are remembered; beyond, those that were longest without a row are forgotten."""


class Request:
    """One request: its running token and what came before it.

    Attributes:
        key: What events call it.
        task: What the user calls its kind of work; "" for none.
        token_id: The running token's, -1 where unknown.
        layer: Layers of the running token that have routed.
        routes: int16 `[S, K]` of the running token, -1 where not yet known.
        weights: float32 `[S, K]` likewise, 0 where unknown.
        hidden: float32 `[H]` that entered the experts of layer `layer - 1`, or None.
        entered: float32 `[H]` that entered those of layer 0, or None.
        previous: int16 `[S, K]` of the token before, -1 throughout at a sequence's start.
        earlier: float32 `[S, H]` that entered the experts for the token before, or None.
        tokens: Finished tokens.
        decoding: Whether the running step holds one token of it.
        memory: The predictor's own.
    """

    __slots__ = (
        "decoding",
        "earlier",
        "entered",
        "hidden",
        "key",
        "layer",
        "memory",
        "previous",
        "routes",
        "task",
        "token_id",
        "tokens",
        "weights",
    )

    def __init__(self, key: int, task: str, num_layers: int, top_k: int) -> None:
        self.key = key
        self.task = task
        self.token_id = -1
        self.layer = 0
        self.routes: Array = np.full((num_layers, top_k), -1, np.int16)
        self.weights: Array = np.zeros((num_layers, top_k), np.float32)
        self.hidden: Array | None = None
        self.entered: Array | None = None
        self.previous: Array = np.full((num_layers, top_k), -1, np.int16)
        self.earlier: Array | None = None
        self.tokens = 0
        self.decoding = False
        self.memory: Any = None

    def idle(self) -> Request:
        """The same request as its next token will find it, if nothing more happens before."""
        if self.layer == 0 and self.token_id == -1:
            return self
        later = copy.copy(self)
        later.token_id = -1
        later.layer = 0
        later.hidden = later.entered = None
        later.routes = np.full_like(self.routes, -1)
        later.weights = np.zeros_like(self.weights)
        return later


class _Step:
    """One request's tokens in the running step, until all layers have routed."""

    __slots__ = ("entered", "experts", "ids", "states", "weights")

    def __init__(self, ids: Array, num_layers: int, top_k: int) -> None:
        self.ids = ids
        self.experts = np.full((len(ids), num_layers, top_k), -1, np.int16)
        self.weights = np.zeros((len(ids), num_layers, top_k), np.float32)
        self.entered: Array | None = None
        self.states: Array | None = None  # [S, H] of the last token alone: a prompt's are many


class LiveRequests:
    """Turns events of whole batches into finished tokens of single requests.

    Args:
        num_layers: S.
        top_k: K; wider events are cut, narrower ones filled with -1.
        begin: Called with a request that is seen for the first time.
        finish: Called with a request whose running token has all its routes.
        leave: Called with a request that has no row in the step that begins.
        give_up: Called with a request whose running token will never have all its routes, for
            another step of it begins.
    """

    def __init__(
        self,
        num_layers: int,
        top_k: int,
        *,
        begin: Callable[[Request], None],
        finish: Callable[[Request], None],
        leave: Callable[[Request], None],
        give_up: Callable[[Request], None],
    ) -> None:
        self._num_layers, self._top_k = num_layers, top_k
        self._on_begin, self._on_finish, self._on_leave = begin, finish, leave
        self._on_give_up = give_up
        self._known: OrderedDict[int, Request] = OrderedDict()
        self._steps: dict[int, _Step] = {}
        self.running: list[Request] = []
        self.layer = 0

    def begin_step(
        self, requests: Array, token_ids: Array | None, tasks: Sequence[str] = ()
    ) -> None:
        """The rows of a forward; those of one request are consecutive tokens of it."""
        before = self.running
        self.running, self._steps, self.layer = [], {}, 0
        keys = np.asarray(requests)
        here = dict.fromkeys(keys.tolist())
        for request in before:  # first, so that who comes knows what they taught
            if request.key not in here:
                request.decoding = False
                self._on_leave(request)
        for key in here:
            rows = np.flatnonzero(keys == key)
            task = tasks[int(rows[0])] if len(tasks) > rows[0] else ""
            self._start(int(key), task, len(rows), None if token_ids is None else token_ids[rows])
        while len(self._known) > max(MAX_REQUESTS, len(self.running)):
            self._known.popitem(last=False)

    def observe(self, event: RoutingEvent) -> None:
        """One layer's routes; after the last layer, every row's token is finished."""
        if not 0 <= event.layer < self._num_layers:
            return
        keys = np.asarray(event.requests)
        rows_of = {key: np.flatnonzero(keys == key) for key in dict.fromkeys(keys.tolist())}
        if any(
            key not in self._steps or len(self._steps[key].ids) != len(rows)
            for key, rows in rows_of.items()
        ):  # no begin_step told of them
            self.begin_step(keys, event.token_ids, event.tasks)
        width = min(self._top_k, event.experts.shape[1])
        for request in self.running:
            rows = rows_of.get(request.key)
            if rows is None:
                continue
            step = self._steps[request.key]
            step.experts[:, event.layer, :width] = event.experts[rows, :width]
            if event.weights is not None:
                step.weights[:, event.layer, :width] = event.weights[rows, :width]
            if event.layer == 0 and event.hidden is not None:
                step.entered = event.hidden[rows]
                request.entered = step.entered[0]
            if event.hidden is not None:
                if step.states is None:
                    step.states = np.zeros((self._num_layers, event.hidden.shape[1]), np.float32)
                step.states[event.layer] = event.hidden[rows[-1]]
            request.layer = event.layer + 1
            if request.decoding:
                request.hidden = None if event.hidden is None else event.hidden[rows[0]].copy()
        self.layer = event.layer + 1
        if self.layer == self._num_layers:
            self._finish_step()

    def _start(self, key: int, task: str, tokens: int, ids: Array | None) -> None:
        request = self._known.get(key)
        if request is None:
            request = self._known[key] = Request(key, task, self._num_layers, self._top_k)
            self._on_begin(request)
        elif request.layer > 0:
            self._on_give_up(request)
        self._known.move_to_end(key)
        held = np.full(tokens, -1, np.int64) if ids is None else np.asarray(ids, np.int64)
        step = self._steps[key] = _Step(held, self._num_layers, self._top_k)
        request.decoding = tokens == 1
        request.token_id = int(held[0]) if request.decoding else -1
        request.routes, request.weights = step.experts[0], step.weights[0]
        request.layer, request.hidden, request.entered = 0, None, None
        self.running.append(request)

    def _finish_step(self) -> None:
        """Layer S - 1 has routed: `layer` stays S, so that plans are of the next step."""
        for request in self.running:
            step = self._steps[request.key]
            for i in range(len(step.ids)):
                request.token_id = int(step.ids[i])
                request.routes, request.weights = step.experts[i], step.weights[i]
                request.entered = None if step.entered is None else step.entered[i]
                request.layer = self._num_layers
                self._on_finish(request)
                request.previous = request.routes.copy()  # a prompt's arrays are not kept for it
                request.tokens += 1
            request.earlier = step.states
            request.hidden = request.entered = None
            request.token_id, request.layer = -1, 0
            request.routes = np.full_like(request.previous, -1)
            request.weights = np.zeros_like(request.weights)
        self._steps = {}
