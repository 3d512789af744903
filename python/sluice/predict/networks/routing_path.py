"""All layers' experts of a token in one pass, before its layer 0 runs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.nn import functional

from sluice.errors import ConfigError
from sluice.predict.arrays import ids_of, multi_hot, rows_of, take
from sluice.predict.networks.causal import Causal, Past
from sluice.predict.networks.token_network import (
    UNKNOWN_ID,
    Loss,
    Piece,
    TokenNetwork,
    hashed_sum,
)
from sluice.predict.networks.training import check_ranges
from sluice.predict.offline import previous_routes
from sluice.trace import Trace

Array = NDArray[Any]

_UNKNOWN_IN_TRAINING = 0.1


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
        batch_tokens: Tokens of a training step, were all stretches of full length.
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
        token = hashed_sum(ids, (self.first, self.second), self.first.num_embeddings)
        x = token + self.previous(previous) + self.counted(rates)
        x, past = self.transformer(self.dropout(x), past)
        prior = torch.logit(rates.clamp(0.002, 0.998))
        return self.head(x) + self.trust * prior, past


class RoutingPath(TokenNetwork[RoutingPathSettings, PathNet, Past]):
    """ExpertFlow's routing-path predictor as a causal transformer over the tokens.

    It reads the ids up to the running token's and the routes of all tokens before, and says S x E
    probabilities at once; with a cache of keys and values, a token at a time.

    Source: 2410.17954 §3.2, §4.3 for the task, the loss and the size; that it is decoder-only,
    reads the routes of the token before, and ids through two hashed tables, is this project's.
    """

    name = "routing-path"
    settings_type = RoutingPathSettings
    decays_vectors = False

    _ids: Array | None = None  # int64 [V], sorted
    _rates: Array | None = None  # float32 [V + 1, S * E], those of all tokens last

    def _new_net(self) -> PathNet:
        assert self.shape is not None
        return PathNet(self.settings, self.shape.num_layers, self.shape.num_experts)

    def _new_past(self) -> Past:
        return Past()

    def _run(self, ids: Array, previous: Array, past: Past) -> tuple[torch.Tensor, Past]:
        assert self._net is not None and self.shape is not None
        hot = torch.from_numpy(multi_hot(previous, self.shape.num_experts)).flatten(1)
        rates = torch.from_numpy(self._rates_of(ids))
        logits, past = self._net(torch.from_numpy(ids)[None], hot[None], rates[None], past)
        return logits[0], past

    def _rates_of(self, ids: Array) -> Array:
        """What fitted tokens of these ids used, `[T, S * E]`."""
        assert self._ids is not None and self._rates is not None
        return self._rates[rows_of(ids, self._ids)]

    def _lesson(self, trace: Trace) -> Loss:
        ids, previous = ids_of(trace), previous_routes(trace)
        used = multi_hot(trace.experts, trace.num_experts).reshape(trace.num_tokens, -1)
        table = _Table(ids, used)
        self._ids, self._rates = table.ids, table.rates
        rates_of = [table.without(sequence.rows) for sequence in trace.sequences]

        def loss(batch: list[Piece], rng: np.random.Generator) -> torch.Tensor:
            """Binary cross-entropy, mean over all; some ids are forgotten."""
            assert self._net is not None
            length = max(rows.stop - rows.start for _, rows in batch)
            token = np.full((len(batch), length), UNKNOWN_ID, np.int64)
            before = np.zeros((len(batch), length, used.shape[1]), np.float32)
            rates, wanted = np.zeros_like(before), np.zeros_like(before)
            real = np.zeros(token.shape, bool)
            for i, (sequence, rows) in enumerate(batch):
                count = rows.stop - rows.start
                token[i, :count] = ids[rows]
                token[i, :count][rng.random(count) < _UNKNOWN_IN_TRAINING] = UNKNOWN_ID
                hot = multi_hot(previous[rows], trace.num_experts)
                before[i, :count] = hot.reshape(count, -1)
                rates[i, :count] = rates_of[sequence](token[i, :count])
                wanted[i, :count] = used[rows]
                real[i, :count] = True
            arrays = (torch.from_numpy(each) for each in (token, before, rates))
            logits, _ = self._net(*arrays, Past())
            mask = torch.from_numpy(real)
            return functional.binary_cross_entropy_with_logits(
                logits[mask], torch.from_numpy(wanted)[mask]
            )

        return loss

    # State

    def state(self) -> dict[str, Array]:
        """The network by its parameters' names, `table.ids` and `table.rates`."""
        assert self._ids is not None and self._rates is not None
        return {
            **super().state(),
            "table.ids": self._ids,
            "table.rates": self._rates.astype(np.float16),
        }

    def load_state(self, arrays: Mapping[str, Array]) -> None:
        """Takes what `state` gave."""
        super().load_state(arrays)
        assert self.shape is not None
        wide = self.shape.num_layers * self.shape.num_experts
        self._ids = take(arrays, "table.ids", (-1,), np.int64)
        rates = take(arrays, "table.rates", (len(self._ids) + 1, wide), np.float16)
        self._rates = rates.astype(np.float32)


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

    def without(self, rows: slice) -> Callable[[Array], Array]:
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
