"""Tokens like the one at hand, and what followed them: nearest neighbours in routing.

A memory row is a token of a fitted or a finished stretch of text: the set of experts it used at
each layer, that of the token before it, and how soon each expert was used again in its sequence.
Token t at layer s is compared with every row by the experts of its layers up to s,

    similarity = a Σ_j≤s d^(s-j) |R_t,j ∩ R_m,j| / K / Σ_j d^(s-j) + b |R_t-1 ∩ R_m-1| / (S K),

and what followed the rows is averaged with weights exp(similarity - the largest), nothing below
`FLOOR`. It is a softmax over the memory, so it needs no training; it is fMoE's idea (2502.05370) of
matching trajectories, taken per token, with a discounted future in place of one iteration's map.

What may be read: a row of the running sequence counts once its `WINDOW` tokens of future are over,
rows of earlier sequences at once, so a score reads nothing later than its own token and layer.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from sluice.predict.arrays import multi_hot

Array = NDArray[Any]

WINDOW = 16
"""Tokens that the future of a row is followed for."""
DISCOUNTS = (0.5, 0.8, 0.9)
FLOOR = 1e-3
"""Relative weight below which a row does not count: keeps the average sparse."""
_LARGE = 2048
"""Query rows from which on products are made in bfloat16 (sums of overlaps stay exact)."""
_BLOCK = 512


@dataclass(frozen=True, slots=True)
class Likeness:
    """The similarity's constants: a, b and d of the module's formula."""

    running: float = 20.0
    previous: float = 10.0
    fade: float = 0.85


@dataclass(frozen=True, slots=True)
class Stretch:
    """Tokens in order.

    Args:
        routes: int16 `[M, S, K]`.
        sequence: int64 `[M]`, which sequence a row belongs to; rows of one are consecutive.
        num_experts: E.
    """

    routes: Array
    sequence: Array
    num_experts: int

    @property
    def begins(self) -> Array:
        """Bool `[M]`: the first row of a sequence."""
        first = np.ones(len(self.sequence), bool)
        first[1:] = self.sequence[1:] != self.sequence[:-1]
        return first

    def used(self) -> torch.Tensor:
        """uint8 `[M, S, E]` of 0 and 1."""
        return torch.from_numpy(multi_hot(self.routes, self.num_experts).astype(np.uint8))

    def next_uses(self) -> Array:
        """uint8 `[M, S, E]`: tokens until the next use in the sequence, 0 for none in `WINDOW`."""
        used = multi_hot(self.routes, self.num_experts).astype(bool)
        found = np.zeros(used.shape, np.uint8)
        for ahead in range(min(WINDOW, len(used) - 1), 0, -1):
            same = self.sequence[ahead:] == self.sequence[:-ahead]
            later = used[ahead:] & same[:, None, None]
            found[:-ahead][later] = ahead
        return found


def discounted(next_uses: Array) -> Array:
    """What rows are worth: float32 `[..., G]`, g^(next use - 1) per discount, 0 for no use."""
    table = np.zeros((WINDOW + 1, len(DISCOUNTS)), np.float32)
    table[1:] = np.asarray(DISCOUNTS)[None] ** np.arange(WINDOW)[:, None]
    return table[next_uses]


def visible_rows(sequence: Array, recent: int) -> tuple[Array, Array]:
    """Which earlier rows of a stream each of its tokens may use: those from `low` up to `high`."""
    rows = np.arange(len(sequence))
    first = np.searchsorted(sequence, sequence)  # sequences are numbered in order
    high = np.maximum(first, rows - WINDOW)
    return np.maximum(high - recent, 0), high


def recall(
    stream: Stretch,
    memory: Stretch,
    likeness: Likeness,
    *,
    recent: int,
    leave_out: bool = False,
) -> Iterator[tuple[slice, torch.Tensor, torch.Tensor]]:
    """What followed tokens like each token of a stream, per layer, block by block.

    Args:
        stream: The tokens that are asked for.
        memory: Fitted rows.
        likeness: Constants of the similarity.
        recent: How many finished rows of the stream itself count beside the memory.
        leave_out: The stream is the memory itself: of a token's own sequence only finished rows
            count, all rows of the others.

    Yields:
        Rows of the stream, float32 `[B, S, E, G]` of what followed, and `[B, S, 2]` of how sure
        that is: the best similarity, and the logarithm of how many rows are about as similar.
    """
    parts = [memory] if leave_out else [memory, stream]
    used, future = (
        torch.cat([part.used() for part in parts]),
        np.concatenate([part.next_uses() for part in parts]),
    )
    count, layers, experts = used.shape
    kind = torch.bfloat16 if len(stream.routes) >= _LARGE else torch.float32
    top_k = stream.routes.shape[2]
    begins = np.concatenate([part.begins for part in parts])
    whole = used.view(count, -1)
    keys = [used[:, s].to(kind) for s in range(layers)]
    worth = [
        torch.from_numpy(discounted(future[:, s])).transpose(1, 2).reshape(count, -1).to(kind)
        for s in range(layers)
    ]
    low, high = visible_rows(stream.sequence, recent)
    fitted = len(memory.routes)
    offset = 0 if leave_out else fitted
    number = torch.arange(count)
    owner = torch.from_numpy(memory.sequence)
    first = torch.from_numpy(~stream.begins).float()
    rest = torch.from_numpy(~begins).float()
    for begin in range(0, len(stream.routes), _BLOCK):
        rows = slice(begin, min(begin + _BLOCK, len(stream.routes)))
        mine = number[rows] + offset
        before = whole[(mine - 1).clamp(min=0)].to(kind)
        plain = torch.zeros(len(mine), count)
        plain[:, 1:] = (before @ whole[:-1].to(kind).T).float()
        plain *= first[rows, None] * rest[None] * (likeness.previous / (layers * top_k))
        if leave_out:
            own = torch.from_numpy(stream.sequence[rows])[:, None] == owner[None]
            plain[own & (number[None] >= torch.from_numpy(high[rows])[:, None])] = -torch.inf
        else:
            place = number[None, fitted:] - fitted
            hidden = (place < torch.from_numpy(low[rows])[:, None]) | (
                place >= torch.from_numpy(high[rows])[:, None]
            )
            plain[:, fitted:][hidden] = -torch.inf
        followed = torch.empty(len(mine), layers, experts, len(DISCOUNTS))
        sure = torch.empty(len(mine), layers, 2)
        running = torch.zeros_like(plain)
        scale = 0.0
        for s in range(layers):
            running = running * likeness.fade + (keys[s][mine] @ keys[s].T).float() / top_k
            scale = scale * likeness.fade + 1.0
            likely = plain + running * (likeness.running / scale)
            best = likely.amax(1, keepdim=True)
            weight = likely.sub_(best.clamp(min=-1e30)).exp_()
            weight[weight < FLOOR] = 0
            total = weight.sum(1, keepdim=True).clamp(min=FLOOR)
            average = (weight / total).to(kind) @ worth[s]
            followed[:, s] = average.view(-1, len(DISCOUNTS), experts).transpose(1, 2)
            sure[:, s, 0] = best[:, 0].clamp(min=0) / (likeness.running + likeness.previous)
            sure[:, s, 1] = total[:, 0].log() / 8
        yield rows, followed, sure


class LiveRecall:
    """`recall` for one token and layer at a time: the same figures from a growing memory.

    Rows lie in a fixed number of columns: the fitted ones first, then a ring of recent ones.

    Shapes:
        `_used` uint8 `[S, E, C]`: whether column c used an expert; a layer's overlap with all
        columns is the sum of K of its rows. `_next` uint8 `[C, S, E]`: as `Stretch.next_uses`.
        `_before` int64 `[C]`: column of the token before, -1 for none.
    """

    def __init__(self, memory: Stretch, likeness: Likeness, recent: int) -> None:
        layers, top_k = memory.routes.shape[1:]
        self._likeness, self._top_k, self._layers = likeness, top_k, layers
        self._fitted, self._recent = len(memory.routes), recent
        # One column more than counts: the oldest is only there as what came before the next.
        columns = self._fitted + (recent + 1 if recent else 0)
        self._used = np.zeros((layers, memory.num_experts, columns), np.uint8)
        self._used[:, :, : self._fitted] = memory.used().permute(1, 2, 0).numpy()
        self._next = np.zeros((columns, layers, memory.num_experts), np.uint8)
        self._next[: self._fitted] = memory.next_uses()
        self._before = np.full(columns, -1, np.int64)
        self._before[1 : self._fitted][~memory.begins[1:]] = np.flatnonzero(~memory.begins[1:])
        self._bias = np.zeros(columns, np.float32)
        self._bias[self._fitted :] = -np.inf
        self._added = 0

    def begin(self, previous: Array | None) -> Looking:
        """A token begins: `previous` are the overlaps `Looking.overlap` of the token before."""
        base = self._bias.copy()
        if previous is not None:
            there = self._before >= 0
            share = self._likeness.previous / (self._layers * self._top_k)
            base[there] += previous[self._before[there]] * np.float32(share)
        return Looking(base)

    def look(self, looking: Looking, layer: int, experts: Array) -> tuple[Array, Array]:
        """After layer `layer` of the token: what followed, `[E, G]`, and how sure, `[2]`."""
        likeness = self._likeness
        shared = self._used[layer, experts[experts >= 0]].sum(0, dtype=np.float32)
        looking.overlap += shared
        looking.running = looking.running * np.float32(likeness.fade) + shared / self._top_k
        looking.scale = looking.scale * likeness.fade + 1.0
        likely = looking.base + looking.running * np.float32(likeness.running / looking.scale)
        best = likely.max() if likely.size else np.float32(-np.inf)
        if best == -np.inf:
            nothing = np.zeros((self._next.shape[2], len(DISCOUNTS)), np.float32)
            return nothing, np.array([0.0, np.log(FLOOR) / 8], np.float32)
        close = np.flatnonzero(likely >= best + np.log(FLOOR))
        weight = np.exp(likely[close] - best)
        total = weight.sum()
        average = np.einsum("c,ceg->eg", weight / total, discounted(self._next[close, layer]))
        sure = max(float(best), 0.0) / (likeness.running + likeness.previous)
        return average, np.array([sure, np.log(total) / 8], np.float32)

    def add(self, routes: Array, next_uses: Array, before: int) -> int:
        """A finished token joins the ring: its routes `[S, K]`, its future, the column before it.

        Returns:
            Its column.
        """
        if not self._recent:
            return -1
        column = self._fitted + self._added % (self._recent + 1)
        self._added += 1
        self._before[self._before == column] = -1
        self._used[:, :, column] = 0
        layer, choice = np.nonzero(routes >= 0)
        self._used[layer, routes[layer, choice], column] = 1
        self._next[column] = next_uses
        self._before[column] = before
        self._bias[column] = 0.0
        if self._added > self._recent:  # the next column to be written is the oldest
            oldest = self._fitted + self._added % (self._recent + 1)
            self._bias[oldest] = -np.inf
        return column


class Looking:
    """One token's comparison with the memory, layer by layer."""

    __slots__ = ("base", "overlap", "running", "scale")

    def __init__(self, base: Array) -> None:
        self.base = base
        self.overlap = np.zeros_like(base)
        self.running = np.zeros_like(base)
        self.scale = 0.0
