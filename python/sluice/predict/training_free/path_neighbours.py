"""Tokens that took a like path so far, voting on what comes: nearest neighbours, from ids alone.

Ours. The likeness of two tokens is the cosine of their sets of experts, layer by layer, a layer
counting `decay` of the one after it; before the first come the tokens before them and, where it is
known, the token itself. Nothing is trained.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sluice.errors import ConfigError
from sluice.predict.arrays import ids_of, multi_hot, take, take_routes
from sluice.predict.base import BasePredictor, Progress
from sluice.predict.live import Request
from sluice.predict.offline import Horizon, known_layers, previous_routes
from sluice.predict.training_free.counting import check_rates, expert_rates
from sluice.predict.training_free.decayed import check_positive
from sluice.predict.training_free.path_store import Block, Likeness, Paths
from sluice.trace import Trace

Array = NDArray[Any]

_ROWS_AT_ONCE = 256
_SMOOTH = np.float32(1e-3)  # ranks experts that no neighbour used by their rates


@dataclass(frozen=True, slots=True, kw_only=True)
class PathNeighboursSettings:
    """Who votes, and with what weight.

    Args:
        capacity: Tokens that are stored, evenly picked from all that were fitted; each takes
            S (2 K + E) bytes, and time at every layer.
        neighbours: How many vote.
        decay: What a layer counts against the one after it.
        previous: What the token before counts, in layers, before it fades likewise.
        token: What the same token id counts, in layers, before it fades likewise; 0: nothing.
        temperature: Of the votes' weights: exp(likeness / temperature).
        adapt: The running sequence's own tokens vote, too.
        adapt_tokens: The last so many of them.
    """

    capacity: int = 16384
    neighbours: int = 32
    decay: float = 0.8
    previous: float = 2.0
    token: float = 4.0
    temperature: float = 0.05
    adapt: bool = False
    adapt_tokens: int = 2048

    def __post_init__(self) -> None:
        check_positive(
            capacity=self.capacity,
            neighbours=self.neighbours,
            previous=self.previous,
            temperature=self.temperature,
            adapt_tokens=self.adapt_tokens,
        )
        if self.token < 0:
            raise ConfigError(f"token: got {self.token}, expected 0 or more")
        if not 0 < self.decay <= 1:
            raise ConfigError(f"decay: got {self.decay}, expected more than 0 and at most 1")


class PathNeighbours(BasePredictor[PathNeighboursSettings]):
    """The weighted mean of what the most alike tokens did at the layer that is asked for."""

    name = "path-neighbours"
    settings_type = PathNeighboursSettings

    _stored: Block | None = None
    _rates: Array | None = None  # [S, E]

    def scores(self, trace: Trace, horizon: Horizon) -> Array:
        """As the base says."""
        self.check(trace)
        known = known_layers(horizon, trace.num_layers)
        found = np.zeros((*trace.experts.shape[:2], trace.num_experts), np.float32)
        if self._stored is None:
            return found
        before, ids = previous_routes(trace), ids_of(trace)
        for sequence in trace.sequences:
            for start in range(0, sequence.length, _ROWS_AT_ONCE):
                stop = min(start + _ROWS_AT_ONCE, sequence.length)
                at = slice(sequence.start + start, sequence.start + stop)
                paths, allowed = Paths(self._stored), None
                if self.settings.adapt:
                    first = max(start - self.settings.adapt_tokens, 0)
                    own = slice(sequence.start + first, sequence.start + stop)
                    paths = self._with(trace.experts[own], before[own], ids[own])
                    allowed = self._who_may(np.arange(start, stop) - first, len(paths))
                hot = multi_hot(trace.experts[at], paths.num_experts)
                old = multi_hot(before[at], paths.num_experts)
                likeness = Likeness(paths, old, ids[at], self.settings, allowed=allowed)
                done, voters = 0, likeness.voters()
                for layer, layers in enumerate(known.tolist()):
                    if layers > done:
                        for new in range(done, layers):
                            likeness.add(hot[:, new])
                        done, voters = layers, likeness.voters()
                    found[at, layer] = self._vote(paths, voters, layer)
        return found

    def state(self) -> dict[str, Array]:
        """`rates` float32 `[S, E]`, `routes` and `before` int16 `[M, S, K]`, `ids` int64 `[M]`."""
        assert self._stored is not None and self._rates is not None
        stored = self._stored
        return {
            "rates": self._rates,
            "routes": stored.routes,
            "before": stored.before,
            "ids": stored.ids,
        }

    def load_state(self, arrays: Mapping[str, Array]) -> None:
        """Takes what `state` gave."""
        assert self.shape is not None
        layers, experts, top_k = self.shape.num_layers, self.shape.num_experts, self.shape.top_k
        self._rates = check_rates("rates", take(arrays, "rates", (layers, experts)))
        routes = take_routes(arrays, "routes", (-1, layers, top_k), experts)
        before = take_routes(arrays, "before", (len(routes), layers, top_k), experts)
        ids = take(arrays, "ids", (len(routes),), np.int64)
        self._stored = Block(routes, before, ids, experts)

    def _fit(
        self, trace: Trace, choose: Trace | None, seed: int, progress: Progress
    ) -> Mapping[str, Any] | None:
        self._rates = expert_rates(trace)
        stored = min(self.settings.capacity, trace.num_tokens)
        rows = np.unique(np.linspace(0, trace.num_tokens - 1, stored).round().astype(np.int64))
        before, ids = previous_routes(trace)[rows], ids_of(trace)[rows]
        self._stored = Block(trace.experts[rows], before, ids, trace.num_experts)
        progress(1, 1)
        return {"paths": len(rows)}

    def _begin(self, request: Request) -> None:
        request.memory = _Memory()

    def _predict(self, request: Request, first: int, stop: int) -> Array:
        assert self.shape is not None
        if self._stored is None:
            return np.zeros((stop - first, self.shape.num_experts), np.float32)
        memory: _Memory = request.memory
        stamp = (request.tokens, request.token_id)  # of a token that is idle, too: it has no id
        if memory.likeness is None or request.layer < memory.layers or memory.stamp != stamp:
            memory.stamp = stamp
            memory.paths = Paths(self._stored)
            if self.settings.adapt and memory.routes:
                most = self.settings.adapt_tokens
                own = np.stack(memory.routes[-most:]), np.stack(memory.before[-most:])
                memory.paths = self._with(*own, np.array(memory.ids[-most:], np.int64))
            before = multi_hot(request.previous[None], self.shape.num_experts)
            ids = np.array([request.token_id])
            memory.likeness = Likeness(memory.paths, before, ids, self.settings)
            memory.layers = 0
        for layer in range(memory.layers, request.layer):
            memory.likeness.add(multi_hot(request.routes[layer][None], self.shape.num_experts))
        memory.layers = request.layer
        assert memory.paths is not None
        voters = memory.likeness.voters()
        rows = [self._vote(memory.paths, voters, layer) for layer in range(first, stop)]
        return np.concatenate(rows)

    def _finish(self, request: Request) -> None:
        memory: _Memory = request.memory
        memory.likeness = None
        if self.settings.adapt:
            memory.routes.append(request.routes)
            memory.before.append(request.previous)
            memory.ids.append(request.token_id)
            most = self.settings.adapt_tokens
            del memory.routes[:-most], memory.before[:-most], memory.ids[:-most]

    def _with(self, routes: Array, before: Array, ids: Array) -> Paths:
        """What is stored, and a sequence's own tokens behind it."""
        assert self._stored is not None
        return Paths(self._stored, Block(routes, before, ids, self._stored.num_experts))

    def _who_may(self, places: Array, num_paths: int) -> Array:
        """Stored tokens, and of a sequence's own the last ones before each: bool `[N, M]`."""
        assert self._stored is not None
        stored = len(self._stored.routes)
        behind = places[:, None] - (np.arange(num_paths) - stored)
        own = (behind > 0) & (behind <= self.settings.adapt_tokens)
        own[:, :stored] = True
        return own

    def _vote(self, paths: Paths, voters: tuple[Array, Array], layer: int) -> Array:
        assert self._rates is not None
        who, weights = voters
        total = weights.sum(axis=1, keepdims=True)
        share = paths.votes(who, weights, layer) / np.maximum(total, np.float32(1e-9))
        rates = self._rates[layer]
        smooth = np.where(total > 1e-6, _SMOOTH, np.float32(1))  # nobody is like it: rates alone
        return ((1 - smooth) * share + smooth * rates).clip(0, 1)


class _Memory:
    """A request's own tokens, and how like others its running token is."""

    __slots__ = ("before", "ids", "layers", "likeness", "paths", "routes", "stamp")

    def __init__(self) -> None:
        self.routes: list[Array] = []
        self.before: list[Array] = []
        self.ids: list[int] = []
        self.stamp: tuple[int, int] = (-1, -1)
        self.paths: Paths | None = None
        self.likeness: Likeness | None = None
        self.layers = 0
