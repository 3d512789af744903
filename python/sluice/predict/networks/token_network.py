"""What predictors share whose network reads tokens in order: scores, descent, live protocol."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Generic, Protocol, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from sluice.predict.arrays import ids_of, multi_hot
from sluice.predict.base import BasePredictor, Progress
from sluice.predict.live import Request
from sluice.predict.networks.training import Descent, load_module, module_state, seeded
from sluice.predict.offline import Horizon, known_layers, previous_routes
from sluice.trace import Trace

Array = NDArray[Any]

UNKNOWN_ID = -1
HASHES = ((0x9E3779B1, 0x7FEB352D), (0x85EBCA77, 0x846CA68B))
"""Multiplier and mix of each of the two tables that token ids are hashed into."""
_ROWS = 1024  # tokens of one sequence that go through at once: bounds masks and attention

Piece = tuple[int, slice]
"""Number of a sequence, and rows of it."""
Loss = Callable[[list[Piece], np.random.Generator], torch.Tensor]
"""What the network misses on a batch."""


class TokenSettings(Protocol):
    """What the descent reads."""

    @property
    def epochs(self) -> int:
        """Passes; with sequences to choose on the best one is kept."""
        ...

    @property
    def sequence_tokens(self) -> int:
        """Length of the stretches that are trained on."""
        ...

    @property
    def batch_tokens(self) -> int:
        """Tokens of a training step."""
        ...


Settings = TypeVar("Settings", bound=TokenSettings)
Net = TypeVar("Net", bound=nn.Module)
Past = TypeVar("Past")


@dataclass(slots=True)
class _Memory(Generic[Past]):
    """What a request's network is at.

    Attributes:
        past: Of finished tokens, but for `unread`.
        unread: Finished tokens that did not go through yet: id, routes of the token before.
        trial: The running token's id, its probabilities `[S, E]` and the past with it; None before
            it is asked for.
    """

    past: Past
    unread: list[tuple[int, Array]] = field(default_factory=list[tuple[int, Array]])
    trial: tuple[int, Array, Past] | None = None


class TokenNetwork(BasePredictor[Settings], Generic[Settings, Net, Past]):
    """A network that a request's tokens go through in order, and that keeps a past of them.

    It says all layers of a token at once, before layer 0 runs, from ids up to the token's own and
    routes of the tokens before. A subclass says `_new_net`, `_new_past`, `_run` and `_lesson`; it
    extends `state` and `load_state` if it learns more than the network.
    """

    decays_vectors: ClassVar[bool] = True
    """Whether weight decay shrinks parameters of one dimension, too."""

    _net: Net | None = None

    # For subclasses

    def _new_net(self) -> Net:
        """A network for `shape`, its weights drawn from torch's generator."""
        raise NotImplementedError

    def _new_past(self) -> Past:
        """Of a sequence that begins."""
        raise NotImplementedError

    def _run(self, ids: Array, previous: Array, past: Past) -> tuple[torch.Tensor, Past]:
        """Tokens of one sequence through the network.

        Args:
            ids: int64 `[T]`, -1 unknown.
            previous: int16 `[T, S, K]`: routes of the token before each.
            past: Of the tokens before.

        Returns:
            Logits `[T, S * E]`, and the past with these tokens.
        """
        raise NotImplementedError

    def _lesson(self, trace: Trace) -> Loss:
        """Learns from a trace what needs no descent; the loss that the descent goes down."""
        raise NotImplementedError

    def _pieces_a_step(self, pieces: list[Piece]) -> int:
        """How many pieces a step trains on: `batch_tokens`, were all of full length."""
        return max(1, self.settings.batch_tokens // self.settings.sequence_tokens)

    # Offline

    def scores(self, trace: Trace, horizon: Horizon) -> Array:
        """As the base says; known layers of the running token change nothing."""
        self.check(trace)
        known_layers(horizon, trace.num_layers)
        found = np.zeros((*trace.experts.shape[:2], trace.num_experts), np.float32)
        if self._net is None:
            return found
        ids, previous = ids_of(trace), previous_routes(trace)
        for sequence in trace.sequences:
            past, stop = self._new_past(), sequence.start + sequence.length
            for begin in range(sequence.start, stop, _ROWS):
                rows = slice(begin, min(begin + _ROWS, stop))
                found[rows], past = self._likely(ids[rows], previous[rows], past)
        return found

    def _likely(self, ids: Array, previous: Array, past: Past) -> tuple[Array, Past]:
        """`_run` for use: probabilities `[T, S, E]`."""
        assert self.shape is not None
        with torch.no_grad():
            logits, past = self._run(ids, previous, past)
            likely = logits.sigmoid().numpy()
        return likely.reshape(len(ids), self.shape.num_layers, -1), past

    # Fitting

    def _fit(
        self, trace: Trace, choose: Trace | None, seed: int, progress: Progress
    ) -> Mapping[str, Any] | None:
        settings = self.settings
        rng = np.random.default_rng(seed)
        loss = self._lesson(trace)
        notes: dict[str, Any] = {"loss": [], "choose_loss": []}
        with seeded(seed):
            self._net = net = self._new_net()
            pieces = pieces_of(trace, settings.sequence_tokens)
            together = self._pieces_a_step(pieces)
            steps = settings.epochs * -(-len(pieces) // together)
            descent = Descent(net, settings, steps, decays_vectors=self.decays_vectors)
            for epoch in range(settings.epochs):
                net.train()
                for batch in batches_of(pieces, together, rng):
                    descent.step(loss(batch, rng))
                net.eval()
                notes["loss"].append(descent.mean_loss())
                if choose is not None:
                    missed = cross_entropy(self.scores(choose, "token"), choose)
                    notes["choose_loss"].append(missed)
                    if descent.keep_if_best(missed):
                        notes["best_epoch"] = epoch
                progress(epoch + 1, settings.epochs)
        descent.restore_best()
        return notes

    # State

    def state(self) -> dict[str, Array]:
        """The network by its parameters' names."""
        assert self._net is not None
        return module_state(self._net)

    def load_state(self, arrays: Mapping[str, Array]) -> None:
        """Takes what `state` gave."""
        net = self._new_net()
        load_module(net, arrays)
        self._net = net.eval()

    # Live

    def _begin(self, request: Request) -> None:
        request.memory = _Memory(self._new_past())

    def _predict(self, request: Request, first: int, stop: int) -> Array:
        assert self.shape is not None
        if self._net is None:
            return np.zeros((stop - first, self.shape.num_experts), np.float32)
        memory: _Memory[Past] = request.memory
        if memory.trial is None or memory.trial[0] != request.token_id:
            for begin in range(0, len(memory.unread), _ROWS):
                some = memory.unread[begin : begin + _ROWS]
                ids = np.array([each[0] for each in some], np.int64)
                previous = np.stack([each[1] for each in some])
                _, memory.past = self._likely(ids, previous, memory.past)
            memory.unread = []
            ids = np.array([request.token_id], np.int64)
            likely, after = self._likely(ids, request.previous[None], memory.past)
            memory.trial = (request.token_id, likely[0], after)
        return memory.trial[1][first:stop]

    def _finish(self, request: Request) -> None:
        memory: _Memory[Past] = request.memory
        if memory.trial is not None and memory.trial[0] == request.token_id and not memory.unread:
            memory.past = memory.trial[2]
        elif self._net is not None:
            memory.unread.append((request.token_id, request.previous))
        memory.trial = None


def hashed_sum(ids: torch.Tensor, tables: Iterable[nn.Module], rows: int) -> torch.Tensor:
    """What stands for token ids, `[..., width]`; zeros for what is unknown.

    Args:
        ids: int64 `[...]`, -1 unknown.
        tables: Two embeddings, of which each gives a row.
        rows: Of each.
    """
    first, second = (
        table(hashed(ids, *each, rows)) for table, each in zip(tables, HASHES, strict=True)
    )
    return torch.where((ids != UNKNOWN_ID)[..., None], first + second, 0.0)


def hashed(ids: torch.Tensor, multiplier: int, mix: int, rows: int) -> torch.Tensor:
    """Rows of a table for token ids; two of these seldom agree for two ids."""
    mixed = ((ids + 1) * multiplier) & 0xFFFFFFFF
    mixed = ((mixed ^ (mixed >> 15)) * mix) & 0xFFFFFFFF
    return (mixed ^ (mixed >> 13)) % rows


def pieces_of(trace: Trace, most: int) -> list[Piece]:
    """All sequences, cut."""
    return [
        (number, slice(begin, min(begin + most, sequence.start + sequence.length)))
        for number, sequence in enumerate(trace.sequences)
        for begin in range(sequence.start, sequence.start + sequence.length, most)
    ]


def batches_of(
    pieces: list[Piece], together: int, rng: np.random.Generator
) -> Iterator[list[Piece]]:
    """Each piece once, those of like length side by side, in another order each time."""
    lengths = np.array([rows.stop - rows.start for _, rows in pieces])
    order = np.argsort(lengths + rng.random(len(lengths)) * 16)
    batches = np.array_split(order, -(-len(order) // together))
    for i in rng.permutation(len(batches)):
        yield [pieces[int(j)] for j in batches[i]]


def cross_entropy(scores: Array, trace: Trace) -> float:
    """Binary cross-entropy of probabilities."""
    wanted = multi_hot(trace.experts, trace.num_experts)
    likely = np.clip(scores, 1e-6, 1 - 1e-6)
    return float(-np.mean(np.where(wanted > 0, np.log(likely), np.log1p(-likely))))
