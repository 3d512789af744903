"""All layers' experts of a token in one pass, before its layer 0 runs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.nn import functional

from sluice.errors import ConfigError
from sluice.predict.arrays import ids_of, multi_hot, rows_of, take
from sluice.predict.base import BasePredictor, Progress
from sluice.predict.live import Request
from sluice.predict.networks.causal import Causal, Past
from sluice.predict.networks.training import (
    Descent,
    check_ranges,
    load_module,
    module_state,
    seeded,
)
from sluice.predict.offline import Horizon, known_layers, previous_routes
from sluice.trace import Trace

Array = NDArray[Any]

HASHES = ((0x9E3779B1, 0x7FEB352D), (0x85EBCA77, 0x846CA68B))
UNKNOWN_ID = -1
_UNKNOWN_IN_TRAINING = 0.1
_ROWS = 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class RoutingPathSettings:
    """How large and how long.

    Args:
        width: Of the transformer.
        layers: Of the transformer.
        heads: Divides the width into even parts.
        window: Tokens that one sees, itself included, per layer.
        table_rows: Of each of the two tables that token ids are hashed into; their sum stands for
            an id, so that the size does not depend on the vocabulary.
        dropout: In training.
        epochs: Passes; with sequences to choose on the best one is kept.
        sequence_tokens: Length of the stretches that are trained on.
        batch_tokens: Tokens of a training step.
        learning_rate: Of AdamW, annealed to nothing.
        weight_decay: Of AdamW.
    """

    width: int = 128
    layers: int = 3
    heads: int = 4
    window: int = 128
    table_rows: int = 16384
    dropout: float = 0.1
    epochs: int = 12
    sequence_tokens: int = 128
    batch_tokens: int = 512
    learning_rate: float = 2e-3
    weight_decay: float = 0.05

    def __post_init__(self) -> None:
        check_ranges(
            self,
            at_least_one=(
                *("width", "layers", "heads", "window", "table_rows"),
                *("epochs", "sequence_tokens", "batch_tokens"),
            ),
            shares=("dropout",),
        )
        if self.width % (2 * self.heads):
            raise ConfigError(
                f"width: got {self.width}, expected a multiple of twice the {self.heads} heads"
            )


class PathNet(nn.Module):
    """Token ids and the routes of the token before in, S x E logits out.

    Beside the transformer stands what the fitted tokens of an id used (`counted`), so that the
    transformer learns only what the id does not say.
    """

    def __init__(self, settings: RoutingPathSettings, layers: int, experts: int) -> None:
        super().__init__()
        width = settings.width
        self.first = nn.Embedding(settings.table_rows, width)
        self.second = nn.Embedding(settings.table_rows, width)
        for table in (self.first, self.second):
            nn.init.normal_(table.weight, std=0.02)
        self.previous = nn.Linear(layers * experts, width)
        self.counted = nn.Linear(layers * experts, width)
        self.transformer = Causal(
            width,
            settings.layers,
            settings.heads,
            window=settings.window,
            dropout=settings.dropout,
        )
        self.head = nn.Linear(width, layers * experts)
        self.trust = nn.Parameter(torch.full((layers * experts,), 1.0))
        self.dropout = nn.Dropout(settings.dropout)
        nn.init.zeros_(self.head.weight)

    def forward(
        self, ids: torch.Tensor, previous: torch.Tensor, rates: torch.Tensor, past: Past
    ) -> tuple[torch.Tensor, Past]:
        """Logits `[B, T, S·E]`, and the past with these tokens.

        Args:
            ids: int64 `[B, T]`, -1 unknown.
            previous: `[B, T, S·E]` of 0 and 1: routes of the token before.
            rates: `[B, T, S·E]`: how often fitted tokens of the id used each expert.
            past: Of the tokens before.
        """
        known = (ids != UNKNOWN_ID)[..., None]
        rows = [hashed(ids, *each, self.first.num_embeddings) for each in HASHES]
        token = torch.where(known, self.first(rows[0]) + self.second(rows[1]), 0.0)
        x = token + self.previous(previous) + self.counted(rates)
        x, past = self.transformer(self.dropout(x), past)
        prior = torch.logit(rates.clamp(0.002, 0.998))
        return self.head(x) + self.trust * prior, past


def hashed(ids: torch.Tensor, multiplier: int, mix: int, rows: int) -> torch.Tensor:
    """Rows of a table for token ids; two of these seldom agree for two ids."""
    mixed = ((ids + 1) * multiplier) & 0xFFFFFFFF
    mixed = ((mixed ^ (mixed >> 15)) * mix) & 0xFFFFFFFF
    return (mixed ^ (mixed >> 13)) % rows


@dataclass(slots=True)
class _Memory:
    """What a request's transformer is at.

    Attributes:
        past: Of finished tokens, but for `unread`.
        unread: Finished tokens that did not go through yet: id, routes of the token before.
        trial: The running token's id and what came of it; None before it is asked for.
    """

    past: Past = field(default_factory=Past)
    unread: list[tuple[int, Array]] = field(default_factory=list[tuple[int, Array]])
    trial: tuple[int, Array, Past] | None = None


class RoutingPath(BasePredictor[RoutingPathSettings]):
    """ExpertFlow's routing-path predictor as a causal transformer over the tokens.

    It reads the ids up to the running token's and the routes of all tokens before, and says S x E
    probabilities at once; with a cache of keys and values, a token at a time.

    Source: 2410.17954 §3.2, §4.3 for the task, the loss and the size; that it is decoder-only,
    reads the routes of the token before, and ids through two hashed tables, is this project's.
    """

    name = "routing-path"
    settings_type = RoutingPathSettings

    _net: PathNet | None = None
    _ids: Array | None = None  # int64 [V], sorted
    _rates: Array | None = None  # float32 [V + 1, S * E], those of all tokens last

    # Offline

    def scores(self, trace: Trace, horizon: Horizon) -> Array:
        """As the base says; known layers of the running token change nothing."""
        self.check(trace)
        known_layers(horizon, trace.num_layers)
        found = np.zeros((*trace.experts.shape[:2], trace.num_experts), np.float32)
        if self._net is None:
            return found
        previous = previous_routes(trace)
        ids = ids_of(trace)
        with torch.no_grad():
            for sequence in trace.sequences:
                past = Past()
                for begin in range(sequence.start, sequence.start + sequence.length, _ROWS):
                    rows = slice(begin, min(begin + _ROWS, sequence.start + sequence.length))
                    logits, past = self._run(ids[rows], previous[rows], past)
                    found[rows] = logits.sigmoid().view(-1, *found.shape[1:]).numpy()
        return found

    def _run(self, ids: Array, previous: Array, past: Past) -> tuple[torch.Tensor, Past]:
        """Tokens of one sequence: logits `[T, S * E]`."""
        assert self._net is not None and self.shape is not None
        hot = torch.from_numpy(multi_hot(previous, self.shape.num_experts)).flatten(1)
        rates = torch.from_numpy(self._rates_of(ids))
        logits, past = self._net(torch.from_numpy(ids)[None], hot[None], rates[None], past)
        return logits[0], past

    def _rates_of(self, ids: Array) -> Array:
        """What fitted tokens of these ids used, `[T, S * E]`."""
        assert self._ids is not None and self._rates is not None
        return self._rates[rows_of(ids, self._ids)]

    # Fitting

    def _fit(
        self, trace: Trace, choose: Trace | None, seed: int, progress: Progress
    ) -> Mapping[str, Any] | None:
        settings = self.settings
        rng = np.random.default_rng(seed)
        ids = ids_of(trace)
        previous = previous_routes(trace)
        used = multi_hot(trace.experts, trace.num_experts).reshape(trace.num_tokens, -1)
        table = _Table(ids, used)
        self._ids, self._rates = table.ids, table.rates
        others = [table.without(sequence.rows) for sequence in trace.sequences]
        notes: dict[str, Any] = {"loss": [], "choose_loss": []}
        with seeded(seed):
            self._net = net = PathNet(settings, trace.num_layers, trace.num_experts)
            pieces = pieces_of(trace, settings.sequence_tokens)
            together = max(1, settings.batch_tokens // settings.sequence_tokens)
            batches = -(-len(pieces) // together)
            descent = Descent(net, settings, settings.epochs * batches, decays_vectors=False)
            for epoch in range(settings.epochs):
                net.train()
                # Pieces of like length side by side, in another order each time.
                for batch in batches_of(pieces, together, rng):
                    length = max(rows.stop - rows.start for _, rows in batch)
                    token = np.full((len(batch), length), UNKNOWN_ID, np.int64)
                    before = np.zeros((len(batch), length, used.shape[1]), np.float32)
                    rates = np.zeros_like(before)
                    wanted = np.zeros_like(before)
                    real = np.zeros((len(batch), length), bool)
                    for i, (sequence, rows) in enumerate(batch):
                        count = rows.stop - rows.start
                        token[i, :count] = ids[rows]
                        forgotten = rng.random(count) < _UNKNOWN_IN_TRAINING
                        token[i, :count][forgotten] = UNKNOWN_ID
                        hot = multi_hot(previous[rows], trace.num_experts)
                        before[i, :count] = hot.reshape(count, -1)
                        rates[i, :count] = others[sequence](token[i, :count])
                        wanted[i, :count] = used[rows]
                        real[i, :count] = True
                    arrays = (torch.from_numpy(each) for each in (token, before, rates))
                    logits, _ = net(*arrays, Past())
                    mask = torch.from_numpy(real)
                    descent.step(
                        functional.binary_cross_entropy_with_logits(
                            logits[mask], torch.from_numpy(wanted)[mask]
                        )
                    )
                net.eval()
                notes["loss"].append(descent.mean_loss())
                if choose is not None:
                    missed = cross_entropy(self.scores(choose, "token"), choose)
                    notes["choose_loss"].append(missed)
                    if descent.look(missed):
                        notes["best_epoch"] = epoch
                progress(epoch + 1, settings.epochs)
        descent.end()
        return notes

    # State

    def state(self) -> dict[str, Array]:
        """The network by its parameters' names, `table.ids` and `table.rates`."""
        assert self._net is not None and self._ids is not None and self._rates is not None
        return {
            **module_state(self._net),
            "table.ids": self._ids,
            "table.rates": self._rates.astype(np.float16),
        }

    def load_state(self, arrays: Mapping[str, Array]) -> None:
        """Takes what `state` gave."""
        assert self.shape is not None
        wide = self.shape.num_layers * self.shape.num_experts
        net = PathNet(self.settings, self.shape.num_layers, self.shape.num_experts)
        load_module(net, arrays)
        self._net = net.eval()
        self._ids = take(arrays, "table.ids", (-1,), np.int64)
        rates = take(arrays, "table.rates", (len(self._ids) + 1, wide), np.float16)
        self._rates = rates.astype(np.float32)

    # Live

    def _begin(self, request: Request) -> None:
        request.memory = _Memory()

    def _predict(self, request: Request, first: int, stop: int) -> Array:
        assert self.shape is not None
        if self._net is None:
            return np.zeros((stop - first, self.shape.num_experts), np.float32)
        memory: _Memory = request.memory
        if memory.trial is None or memory.trial[0] != request.token_id:
            with torch.no_grad():
                if memory.unread:
                    tokens = np.array([each[0] for each in memory.unread], np.int64)
                    routes = np.stack([each[1] for each in memory.unread])
                    _, memory.past = self._run(tokens, routes, memory.past)
                    memory.unread = []
                logits, after = self._run(
                    np.array([request.token_id], np.int64), request.previous[None], memory.past
                )
            found = logits[0].sigmoid().view(self.shape.num_layers, -1).numpy()
            memory.trial = (request.token_id, found, after)
        return memory.trial[1][first:stop]

    def _finish(self, request: Request) -> None:
        memory: _Memory = request.memory
        if memory.trial is not None and memory.trial[0] == request.token_id and not memory.unread:
            memory.past = memory.trial[2]
        elif self._net is not None:
            memory.unread.append((request.token_id, request.previous))
        memory.trial = None


class _Table:
    """Token id -> how often each expert was used, shrunk towards all tokens' rates."""

    _PRIOR_TOKENS = 2.0

    def __init__(self, ids: Array, used: Array) -> None:
        self.ids, self._row = np.unique(ids[ids >= 0], return_inverse=True)
        self._known = ids >= 0
        self._all_ids, self._used = ids, used
        self._counts = np.zeros((len(self.ids), used.shape[1]), np.float32)
        self._tokens = np.zeros(len(self.ids), np.float32)
        np.add.at(self._tokens, self._row, 1)
        np.add.at(self._counts, self._row, used[self._known])
        self._rate = used.mean(0, keepdims=True)
        self.rates = self._shrunk(self._counts, self._tokens).astype(np.float16).astype(np.float32)

    def _shrunk(self, counts: Array, tokens: Array) -> Array:
        rates = (counts + self._PRIOR_TOKENS * self._rate) / (tokens + self._PRIOR_TOKENS)[:, None]
        return np.concatenate([rates, self._rate])

    def without(self, rows: slice) -> Any:
        """Rates of ids as if these rows had not been counted: what is fitted on must not help."""
        own_ids, own = self._all_ids[rows], self._used[rows]

        def of(ids: Array) -> Array:
            at = rows_of(ids, self.ids)
            counts = np.concatenate([self._counts, np.zeros((1, own.shape[1]), np.float32)])[at]
            tokens = np.append(self._tokens, 0)[at]
            same = (own_ids[None] == ids[:, None]) & (ids[:, None] >= 0)
            counts, tokens = counts - same.astype(np.float32) @ own, tokens - same.sum(1)
            return self._shrunk(counts, tokens)[:-1].astype(np.float32)

        return of


def pieces_of(trace: Trace, most: int) -> list[tuple[int, slice]]:
    """All sequences, cut: number of the sequence, and rows."""
    return [
        (number, slice(begin, min(begin + most, sequence.start + sequence.length)))
        for number, sequence in enumerate(trace.sequences)
        for begin in range(sequence.start, sequence.start + sequence.length, most)
    ]


def batches_of(
    pieces: list[tuple[int, slice]], together: int, rng: np.random.Generator
) -> Iterator[list[tuple[int, slice]]]:
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
