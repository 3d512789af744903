"""Stored tokens and how like a running one they are: what nearest neighbours vote by."""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from sluice.predict.arrays import multi_hot

Array = NDArray[Any]


class Weighing(Protocol):
    """What counts how much: `PathNeighboursSettings`."""

    @property
    def neighbours(self) -> int:
        """How many vote."""
        ...

    @property
    def decay(self) -> float:
        """What a layer counts against the one after it."""
        ...

    @property
    def previous(self) -> float:
        """What the token before counts, in layers."""
        ...

    @property
    def token(self) -> float:
        """What the same token id counts, in layers."""
        ...

    @property
    def temperature(self) -> float:
        """Of the votes' weights."""
        ...


class Block:
    """Stored tokens: their routes, and those of the tokens before them.

    Args:
        routes: int16 `[M, S, K]`.
        before: int16 `[M, S, K]`, -1 throughout at a sequence's start.
        ids: int64 `[M]`, token ids, -1 unknown.
        num_experts: E.
    """

    def __init__(self, routes: Array, before: Array, ids: Array, num_experts: int) -> None:
        self.routes, self.before, self.ids = routes, before, ids
        self.num_experts = num_experts
        self.sizes = (routes >= 0).sum(-1).astype(np.float32)  # [M, S]
        self.before_sizes = (before >= 0).sum((1, 2)).astype(np.float32)
        self._ones: dict[tuple[bool, int], Array] = {}  # uint8 [E, M], made when first asked for

    def overlap(self, hot: Array, layer: int, *, before: bool = False) -> Array:
        """Experts that rows of ones `[N, E]` share with each token at a layer: `[N, M]`."""
        ones = self._ones.get((before, layer))
        if ones is None:
            held = (self.before if before else self.routes)[:, layer]
            ones = multi_hot(held, self.num_experts).T.astype(np.uint8)
            self._ones[before, layer] = ones = np.ascontiguousarray(ones)
        if len(hot) == 1:  # live: a few rows of the table, and no product
            return ones[hot[0] > 0].sum(0, dtype=np.float32)[None]
        return hot @ ones.astype(np.float32)


class Paths:
    """Blocks of stored tokens, numbered through."""

    def __init__(self, *blocks: Block) -> None:
        self.blocks = blocks
        self.num_experts = blocks[0].num_experts
        self.sizes = np.concatenate([block.sizes for block in blocks])
        self.before_sizes = np.concatenate([block.before_sizes for block in blocks])
        self.ids = np.concatenate([block.ids for block in blocks])

    def __len__(self) -> int:
        return len(self.sizes)

    def overlap(self, hot: Array, layer: int) -> Array:
        """As `Block.overlap`."""
        return np.hstack([block.overlap(hot, layer) for block in self.blocks])

    def overlap_before(self, hot: Array) -> Array:
        """Likewise for the tokens before, rows `[N, S, E]`, over all layers: `[N, M]`."""
        found = np.zeros((len(hot), len(self)), np.float32)
        for layer in range(hot.shape[1]):
            new = [block.overlap(hot[:, layer], layer, before=True) for block in self.blocks]
            found += np.hstack(new)
        return found

    def votes(self, voters: Array, weights: Array, layer: int) -> Array:
        """Weights `[N, J]` of voters added up by expert: float32 `[N, E]`."""
        first = self.blocks[0].routes
        ids = first[np.minimum(voters, len(first) - 1), layer].astype(np.int64)  # [N, J, K]
        for own in self.blocks[1:]:
            theirs = voters >= len(first)
            ids[theirs] = own.routes[voters[theirs] - len(first), layer]
        width = self.num_experts + 1  # -1 is the column cut off below
        places = np.arange(len(ids))[:, None, None] * width + ids % width
        held = np.broadcast_to(weights[:, :, None], ids.shape)
        found = np.bincount(places.ravel(), held.ravel(), len(ids) * width)
        return found.reshape(-1, width)[:, : self.num_experts].astype(np.float32)


class Likeness:
    """How like stored paths some tokens are, as their layers become known.

    Args:
        paths: What is stored.
        before: float32 `[N, S, E]`: the tokens before, as ones.
        ids: int64 `[N]`: the tokens, -1 unknown.
        settings: What counts how much.
        allowed: bool `[N, M]`: who may vote; None: all.
    """

    def __init__(
        self,
        paths: Paths,
        before: Array,
        ids: Array,
        settings: Weighing,
        *,
        allowed: Array | None = None,
    ) -> None:
        self._paths, self._settings, self._allowed = paths, settings, allowed
        share = np.float32(settings.previous / before.shape[1])
        self._dots = share * paths.overlap_before(before)
        self._mine = share * before.sum((1, 2))
        self._theirs = share * paths.before_sizes
        self._layers = 0
        weight = np.float32(settings.token * paths.blocks[0].routes.shape[2])
        known = ids >= 0
        if weight and known.any():  # K experts shared in each of so many layers
            self._dots += weight * ((ids[:, None] == paths.ids) & known[:, None])
            self._mine = self._mine + weight * known
            self._theirs = self._theirs + weight * (paths.ids >= 0)

    def add(self, hot: Array) -> None:
        """The next layer of all tokens, ones `[N, E]`."""
        decay = np.float32(self._settings.decay)
        self._dots = decay * self._dots + self._paths.overlap(hot, self._layers)
        self._mine = decay * self._mine + hot.sum(-1)
        self._theirs = decay * self._theirs + self._paths.sizes[:, self._layers]
        self._layers += 1

    def voters(self) -> tuple[Array, Array]:
        """The most alike and their weights, each `[N, J]`.

        A weight counts from the best of those that do not vote, so that it is 0 at the edge: which
        of several equals is left out makes no difference.
        """
        lengths = np.sqrt(np.maximum(self._mine[:, None] * self._theirs, 1e-9))
        alike = self._dots / lengths
        if self._allowed is not None:
            alike = np.where(self._allowed, alike, 0)
        most = min(self._settings.neighbours, alike.shape[1] - 1)
        if most < 1:
            return np.zeros((len(alike), 1), np.int64), np.zeros((len(alike), 1), np.float32)
        best = np.argpartition(-alike, most, axis=1)[:, : most + 1]
        held = np.take_along_axis(alike, best, axis=1)
        top = held.max(axis=1, keepdims=True)
        edge = held.min(axis=1, keepdims=True)
        temperature = np.float32(self._settings.temperature)
        weights = np.exp((held - top) / temperature) - np.exp((edge - top) / temperature)
        return best, weights.astype(np.float32)
