"""Tokens like the one at hand: nearest neighbours in routing, among remembered tokens.

A memory row is a token: the set of experts it used at each layer, and that of the token before it.
Token t, with its layers up to s known, is compared with every row by

    similarity = a Σ_j≤s d^(s-j) |R_t,j ∩ R_m,j| / K / Σ_j d^(s-j) + b |R_t-1 ∩ R_m-1| / (S K),

and whatever is asked of the rows is averaged with weights exp(similarity - the largest), nothing
below `FLOOR`: a softmax over the memory, which needs no training. It is fMoE's idea (2502.05370) of
matching trajectories, taken per token.

Stages: -1, before layer 0 of a token; s, after its layer s.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray

from sluice.errors import ConfigError
from sluice.predict.arrays import multi_hot, take, take_routes
from sluice.predict.base import Shape
from sluice.trace import Trace

Array = NDArray[Any]
Worth: TypeAlias = Callable[[int], torch.Tensor | None]
"""What rows are worth at a stage, `[M, W]` of 0 to 1; None: nothing is asked there."""

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


@dataclass(frozen=True, slots=True, kw_only=True)
class MemorySettings:
    """How much is remembered and how it is compared: settings of who uses the memory.

    Args:
        memory_tokens: Fitted tokens that are kept to compare with; each costs
            layers x experts x 2 bytes while it runs, and time per layer.
        recent_tokens: Finished tokens of the running text that are compared with beside them.
        running: Weight of the running token's routes in a comparison.
        previous: Weight of the routes of the token before.
        fade: What an older layer of the running token counts for against the next.
    """

    memory_tokens: int = 12288
    recent_tokens: int = 8192
    running: float = 20.0
    previous: float = 10.0
    fade: float = 0.85

    @property
    def likeness(self) -> Likeness:
        """The constants of the comparison."""
        return Likeness(self.running, self.previous, self.fade)

    def check_memory(self) -> None:
        """Refuses what can never work.

        Raises:
            ConfigError: Fewer than no recent tokens, or a fade outside of 0 to 1.
        """
        if self.recent_tokens < 0:
            raise ConfigError(f"recent_tokens: got {self.recent_tokens}, expected 0 or more")
        if not 0 < self.fade <= 1:
            raise ConfigError(f"fade: got {self.fade}, expected above 0, at most 1")


@dataclass(frozen=True, slots=True)
class Stretch:
    """Tokens in order.

    Args:
        routes: int16 `[M, S, K]`.
        sequence: int64 `[M]`, which sequence a row belongs to: numbers that never fall.
        num_experts: E.
    """

    routes: Array
    sequence: Array
    num_experts: int

    @classmethod
    def of(cls, trace: Trace) -> Stretch:
        """All of a trace."""
        sequence = np.zeros(trace.num_tokens, np.int64)
        for number, each in enumerate(trace.sequences):
            sequence[each.rows] = number
        return cls(trace.experts, sequence, trace.num_experts)

    @classmethod
    def drawn(cls, trace: Trace, most: int, rng: np.random.Generator) -> Stretch:
        """Whole sequences, drawn while there is room for `most` tokens; at least a part of one."""
        kept: list[int] = []
        tokens = 0
        for i in rng.permutation(len(trace.sequences)):
            if tokens + trace.sequences[i].length <= most or not kept:
                kept.append(int(i))
                tokens += trace.sequences[i].length
        kept.sort()
        chosen = cls.of(trace.select(kept))
        number = np.asarray(kept, np.int64)[chosen.sequence]  # as `of` the whole trace says
        return cls(chosen.routes[:most], number[:most], chosen.num_experts)

    @classmethod
    def of_state(cls, arrays: Mapping[str, Array], shape: Shape) -> Stretch:
        """A memory out of a saved state: `memory.routes` and `memory.sequence`.

        Raises:
            CheckpointError: They are missing, do not fit, or name experts that are not there.
        """
        rows = (-1, shape.num_layers, shape.top_k)
        routes = take_routes(arrays, "memory.routes", rows, shape.num_experts)
        sequence = take(arrays, "memory.sequence", (len(routes),), np.int64)
        return cls(routes, sequence, shape.num_experts)

    @property
    def begins(self) -> Array:
        """Bool `[M]`: the first row of a sequence."""
        first = np.ones(len(self.sequence), bool)
        first[1:] = self.sequence[1:] != self.sequence[:-1]
        return first

    def used(self) -> torch.Tensor:
        """uint8 `[M, S, E]` of 0 and 1."""
        return torch.from_numpy(multi_hot(self.routes, self.num_experts).astype(np.uint8))


def visible_rows(sequence: Array, recent: int, wait: int) -> tuple[Array, Array]:
    """Which earlier rows of a stream each of its tokens may use: those from `low` up to `high`.

    A row of the running sequence is visible `wait` tokens after it has finished, rows of earlier
    sequences at once; the `recent` latest of them count.
    """
    rows = np.arange(len(sequence))
    high = np.maximum(np.searchsorted(sequence, sequence), rows - wait)
    return np.maximum(high - recent, 0), high


def average_over_alike(
    stream: Stretch,
    memory: Stretch,
    likeness: Likeness,
    worth: Worth,
    *,
    recent: int,
    wait: int,
    leave_out: bool = False,
) -> Iterator[tuple[slice, dict[int, torch.Tensor], torch.Tensor]]:
    """What tokens like each token of a stream are worth on average, stage by stage.

    Args:
        stream: The tokens that are asked for.
        memory: Fitted rows.
        likeness: Constants of the similarity.
        worth: Of the memory's rows, then of the stream's.
        recent: How many finished rows of the stream itself count beside the memory.
        wait: See `visible_rows`.
        leave_out: The memory is of the stream itself, by the same numbers of sequences: of a
            token's own sequence only finished rows count, and none of the stream's others.

    Yields:
        Rows of the stream, float32 `[B, W]` per stage that was asked, and how sure `[B, S + 1, 2]`
        (stage -1 first): the best similarity, and the logarithm of how many rows come near it.
    """
    kept, asked = memory.used(), stream.used()
    layers = kept.shape[1]
    kind = torch.bfloat16 if len(stream.routes) >= _LARGE else torch.float32
    top_k = stream.routes.shape[2]
    values = {
        stage: found.to(kind) for stage in range(-1, layers) if (found := worth(stage)) is not None
    }
    low, high = visible_rows(stream.sequence, recent, wait)
    if leave_out:
        low = np.searchsorted(stream.sequence, stream.sequence)
    fitted = len(memory.routes)
    owner = torch.from_numpy(memory.sequence)
    first = torch.from_numpy(~stream.begins).float()
    rest = torch.from_numpy(np.concatenate([~memory.begins, ~stream.begins])).float()
    most = likeness.running + likeness.previous
    for begin in range(0, len(stream.routes), _BLOCK):
        rows = slice(begin, min(begin + _BLOCK, len(stream.routes)))
        # Of the stream, only rows that somebody here may see, and one before them.
        near = slice(max(int(low[rows].min()) - 1, 0), int(high[rows].max()))
        used = torch.cat([kept, asked[near]])
        count = len(used)
        columns = torch.cat(
            [torch.arange(fitted), torch.arange(near.start, near.start + count - fitted) + fitted]
        )
        mine = asked[rows].to(kind)
        before = asked[[max(row - 1, 0) for row in range(rows.start, rows.stop)]].to(kind)
        plain = torch.zeros(len(mine), count)
        plain[:, 1:] = (before.flatten(1) @ used[:-1].flatten(1).to(kind).T).float()
        plain *= first[rows, None] * rest[columns] * (likeness.previous / (layers * top_k))
        if leave_out:
            own = torch.from_numpy(stream.sequence[rows])[:, None] == owner[None]
            plain[:, :fitted][own] = -torch.inf
        place = columns[None, fitted:] - fitted
        hidden = (place < torch.from_numpy(low[rows])[:, None]) | (
            place >= torch.from_numpy(high[rows])[:, None]
        )
        plain[:, fitted:][hidden] = -torch.inf
        averages: dict[int, torch.Tensor] = {}
        sure = torch.empty(len(mine), layers + 1, 2)
        running = torch.zeros_like(plain)
        scale = 0.0
        for stage in range(-1, layers):
            likely = plain
            if stage >= 0:
                overlap = (mine[:, stage] @ used[:, stage].to(kind).T).float() / top_k
                running = running * likeness.fade + overlap
                scale = scale * likeness.fade + 1.0
                likely = plain + running * (likeness.running / scale)
            if stage not in values and stage >= 0:
                continue
            best = likely.amax(1, keepdim=True)
            weight = (likely - best.clamp(min=-1e30)).exp_()
            weight[weight < FLOOR] = 0
            total = weight.sum(1, keepdim=True).clamp(min=FLOOR)
            sure[:, stage + 1, 0] = best[:, 0].clamp(min=0) / most
            sure[:, stage + 1, 1] = total[:, 0].log() / 8
            if stage in values:
                averages[stage] = ((weight / total).to(kind) @ values[stage][columns]).float()
        yield rows, averages, sure


@dataclass(frozen=True, slots=True)
class Alike:
    """Columns that count at a stage, their weights (of sum 1), and how sure, `[2]`."""

    columns: Array
    weights: Array
    sure: Array


class LiveAlike:
    """`average_over_alike` for one token and stage at a time, over a growing memory.

    Rows lie in a fixed number of columns: the fitted ones first, then a ring of recent ones.

    Shapes:
        `used` uint8 `[S, E, C]`: whether column c used an expert; a layer's overlap with all
        columns is the sum of K of its rows.
    """

    def __init__(self, memory: Stretch, likeness: Likeness, recent: int) -> None:
        layers, top_k = memory.routes.shape[1:]
        self._likeness, self._top_k, self._layers = likeness, top_k, layers
        self._fitted, self._recent = len(memory.routes), recent
        # One column more than counts: the oldest is only there as what came before the next.
        self.columns = self._fitted + (recent + 1 if recent else 0)
        self.used = np.zeros((layers, memory.num_experts, self.columns), np.uint8)
        self.used[:, :, : self._fitted] = memory.used().permute(1, 2, 0).numpy()
        self._before = np.full(self.columns, -1, np.int64)
        self._before[1 : self._fitted][~memory.begins[1:]] = np.flatnonzero(~memory.begins[1:])
        self._bias = np.zeros(self.columns, np.float32)
        self._bias[self._fitted :] = -np.inf
        self._added = 0

    def begin(self, previous: Array | None) -> Looking:
        """A token begins: `previous` is `Looking.overlap` of the token before, None for none."""
        base = self._bias.copy()
        if previous is not None:
            there = self._before >= 0
            share = self._likeness.previous / (self._layers * self._top_k)
            base[there] += previous[self._before[there]] * np.float32(share)
        return Looking(base)

    def advance(self, looking: Looking, layer: int, experts: Array) -> None:
        """Layer `layer` of the token has routed."""
        likeness = self._likeness
        shared = self.used[layer, experts[experts >= 0]].sum(0, dtype=np.float32)
        looking.overlap += shared
        looking.running = looking.running * np.float32(likeness.fade) + shared / self._top_k
        looking.scale = looking.scale * likeness.fade + 1.0

    def find(self, looking: Looking) -> Alike:
        """Who is alike by all that has routed."""
        likeness = self._likeness
        likely = looking.base
        if looking.scale:
            likely = likely + looking.running * np.float32(likeness.running / looking.scale)
        best = float(likely.max()) if likely.size else -np.inf
        if best == -np.inf:
            nothing = np.zeros(0, np.float32)
            return Alike(
                nothing.astype(np.int64), nothing, np.array([0, np.log(FLOOR) / 8], np.float32)
            )
        columns = np.flatnonzero(likely >= best + np.log(FLOOR))
        weights = np.exp(likely[columns] - np.float32(best))
        total = weights.sum()
        near = max(best, 0.0) / (likeness.running + likeness.previous)
        return Alike(columns, weights / total, np.array([near, np.log(total) / 8], np.float32))

    def add(self, routes: Array, before: int) -> int:
        """A finished token joins the ring: its routes `[S, K]`, and the column before it.

        Returns:
            Its column; -1 where nothing recent is kept.
        """
        if not self._recent:
            return -1
        column = self._fitted + self._added % (self._recent + 1)
        self._added += 1
        self._before[self._before == column] = -1
        self.used[:, :, column] = 0
        layer, choice = np.nonzero(routes >= 0)
        self.used[layer, routes[layer, choice], column] = 1
        self._before[column] = before
        self._bias[column] = 0.0
        if self._added > self._recent:  # the next column to be written is the oldest
            self._bias[self._fitted + self._added % (self._recent + 1)] = -np.inf
        return column


class Looking:
    """One token's comparison with the memory, layer by layer."""

    __slots__ = ("base", "overlap", "running", "scale")

    def __init__(self, base: Array) -> None:
        self.base = base
        self.overlap = np.zeros_like(base)
        self.running = np.zeros_like(base)
        self.scale = 0.0
