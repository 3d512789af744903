"""ExpertFlow's routing-path predictor in the paper's own shape: T5's encoder and decoder."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.nn import functional

from sluice.hf.t5 import Kept, decode, new_t5
from sluice.predict.arrays import ids_of, multi_hot
from sluice.predict.base import Progress
from sluice.predict.networks.token_network import (
    UNKNOWN_ID,
    Loss,
    Piece,
    TokenNetwork,
    hashed_sum,
)
from sluice.predict.networks.training import check_ranges
from sluice.trace import Trace

Array = NDArray[Any]

# The symbol that the encoder's source starts with: hashed as ids are, and no token's.
_START_ID = -2
_MASKED = torch.finfo(torch.float32).min
# Training reads a random 20 to 100 % of what follows a prompt (source: authors' public code).
_LEAST_PREFIX = 0.2


@dataclass(frozen=True, slots=True, kw_only=True)
class RoutingPathT5Settings:
    """How large and how long; the defaults' skeleton is the paper's, its table is not.

    Args:
        width: d_model.
        inner: d_ff.
        layers: Of the encoder, and of the decoder again.
        heads: Of each attention.
        head_width: d_kv; T5 does not tie it to the width.
        table_rows: Of each of the two tables that token ids are hashed into; their sum stands for
            an id, so that the size does not depend on the vocabulary.
        source_tokens: First tokens of a sequence that the encoder reads, once they have passed.
        window: Tokens that one sees, itself included, per layer; it bounds what a request keeps,
            25 KB a token. T5 tells no distances of 128 and more apart.
        dropout: In training.
        epochs: Passes; with sequences to choose on the best one is kept.
        sequence_tokens: Length of the stretches that are trained on; one further on in a sequence
            reads its source as well, but no tokens between that and its own.
        batch_tokens: Tokens of a training step, on average over stretches of all lengths.
        learning_rate: Of AdamW, annealed to nothing.
        weight_decay: Of AdamW.
    """

    width: int = 32
    inner: int = 2048
    layers: int = 6
    heads: int = 8
    head_width: int = 64
    table_rows: int = 16384
    source_tokens: int = 32
    window: int = 128
    dropout: float = 0.1
    epochs: int = 12
    sequence_tokens: int = 256
    batch_tokens: int = 256
    learning_rate: float = 3e-3
    weight_decay: float = 0.01

    def __post_init__(self) -> None:
        check_ranges(
            self,
            at_least_one=(
                *("width", "inner", "layers", "heads", "head_width", "table_rows"),
                *("source_tokens", "window", "epochs", "sequence_tokens", "batch_tokens"),
            ),
            shares=("dropout",),
        )


@dataclass(frozen=True, slots=True)
class PathPast:
    """What the decoder keeps of tokens that went through it.

    Attributes:
        tokens: How many went through in all, or int64 `[B, 1]` where sequences differ.
        read: int64 `[B, ≤ source_tokens]`, ids of the first of them.
        source: The encoder's states `[B, M, width]`: M is 1, the start symbol alone, until
            `source_tokens` have passed, then 1 + `source_tokens`.
        own: Of the last `window - 1` tokens.
        cross: Of `source`.
    """

    tokens: int | torch.Tensor = 0
    read: torch.Tensor | None = None
    source: torch.Tensor | None = None
    own: Kept = ()
    cross: Kept = ()


class T5PathNet(nn.Module):
    """Token ids in, S x E logits out: T5's stacks, and a head without bias.

    A row of the decoder stands for the token whose id it reads. It sees `window` rows and the
    encoder's start symbol; from row `source_tokens` on also the encoder's states of the first
    `source_tokens` ids. The start symbol reads nothing but itself, so one encoder's pass serves
    early and late rows, and no row reads an id after its own.

    Source: 2410.17954 §3.2, §4.3. Which rows read which ids is this project's: the paper's encoder
    reads the prompt, and its decoder only what follows.
    """

    def __init__(self, settings: RoutingPathT5Settings, layers: int, experts: int) -> None:
        super().__init__()
        self.settings = settings
        model = new_t5(
            vocabulary=settings.table_rows,
            width=settings.width,
            inner=settings.inner,
            layers=settings.layers,
            heads=settings.heads,
            head_width=settings.head_width,
            dropout=settings.dropout,
        )
        second = nn.Embedding(settings.table_rows, settings.width)  # N(0, 1), as T5's own
        self.tables = nn.ModuleList([model.shared, second])
        self.encoder, self.decoder = model.encoder, model.decoder
        for stack in (self.encoder, self.decoder):
            stack.set_input_embeddings(None)  # embedded here: the state holds each table once
        self.head = nn.Linear(settings.width, layers * experts, bias=False)

    def forward(self, ids: torch.Tensor, past: PathPast) -> tuple[torch.Tensor, PathPast]:
        """Logits `[B, T, S·E]`, and the past with these tokens.

        Args:
            ids: int64 `[B, T]`, -1 unknown; rows behind a sequence's end are seen by no other.
            past: Of the tokens before.
        """
        settings, tokens = self.settings, ids.shape[1]
        read = ids if past.read is None else torch.cat([past.read, ids], 1)
        read = read[:, : settings.source_tokens]
        late = past.tokens + torch.arange(tokens) >= settings.source_tokens  # [T] or [B, T]
        source, cross = past.source, past.cross
        width = 1 + settings.source_tokens if bool(late.any()) else 1
        if source is None or source.shape[1] != width:
            source, cross = self._encode(read[:, : width - 1]), ()
        kept = past.own[0][0].shape[2] if past.own else 0
        distance = torch.arange(kept, kept + tokens)[:, None] - torch.arange(kept + tokens)
        states, own, cross = decode(
            self.decoder,
            self._embed(ids),
            _mask((distance >= 0) & (distance < settings.window)),
            source,
            _mask(late[..., None] | (torch.arange(width) == 0)),
            own=past.own,
            cross=cross,
        )
        after = PathPast(
            tokens=past.tokens + tokens,
            read=read,
            source=source,
            own=_without_oldest(own, kept + tokens - settings.window + 1),
            cross=cross,
        )
        return self.head(states), after

    def _encode(self, ids: torch.Tensor) -> torch.Tensor:
        """States `[B, 1 + N, width]` of the start symbol and N ids."""
        symbols = functional.pad(ids, (1, 0), value=_START_ID)
        place = torch.arange(symbols.shape[1])
        seen = _mask((place[:, None] > 0) | (place == 0))
        return self.encoder(inputs_embeds=self._embed(symbols), attention_mask=seen)[0]

    def _embed(self, ids: torch.Tensor) -> torch.Tensor:
        """`[..., width]`; zeros for what is unknown."""
        return hashed_sum(ids, self.tables, self.settings.table_rows)


class RoutingPathT5(TokenNetwork[RoutingPathT5Settings, T5PathNet, PathPast]):
    """`routing-path-t5`: a T5 over token ids, which says S x E probabilities before layer 0 runs.

    It reads no routes. The encoder reads a sequence's first `source_tokens` ids, the decoder all up
    to the running token's own, one token at a time with a cache of keys and values. Needs
    transformers.

    Source: 2410.17954 §3.2, §4.3 for encoder and decoder, size and loss; authors' public code for
    the head without bias and the random prefixes. This project's: two hashed tables, one learning
    rate of 3e-4, a source of fixed length (where a prompt ends is not told to predictors), rows for
    the prompt's own tokens, and a window.
    """

    name = "routing-path-t5"
    settings_type = RoutingPathT5Settings

    @property
    def parameters(self) -> int:
        """Numbers that were learnt, the head's apart; 0 before a fit."""
        return 0 if self._net is None else count_parameters(self._net)

    def _new_net(self) -> T5PathNet:
        assert self.shape is not None
        return T5PathNet(self.settings, self.shape.num_layers, self.shape.num_experts)

    def _new_past(self) -> PathPast:
        return PathPast()

    def _run(self, ids: Array, previous: Array, past: PathPast) -> tuple[torch.Tensor, PathPast]:
        assert self._net is not None
        logits, past = self._net(torch.from_numpy(ids)[None], past)
        return logits[0], past

    def _fit(
        self, trace: Trace, choose: Trace | None, seed: int, progress: Progress
    ) -> Mapping[str, Any] | None:
        notes = super()._fit(trace, choose, seed, progress) or {}
        assert self._net is not None
        sizes = {
            "parameters": count_parameters(self._net),
            "head_parameters": self._net.head.weight.numel(),
        }
        return {**sizes, **notes}

    def _pieces_a_step(self, pieces: list[Piece]) -> int:
        lengths = [rows.stop - rows.start for _, rows in pieces]
        return max(1, round(self.settings.batch_tokens / float(np.mean(lengths))))

    def _lesson(self, trace: Trace) -> Loss:
        known = ids_of(trace)
        source_tokens = self.settings.source_tokens

        def loss(batch: list[Piece], rng: np.random.Generator) -> torch.Tensor:
            """Binary cross-entropy, summed over layers and experts, mean over tokens.

            Of what a sequence wrote behind its prompt a random share is read, from its beginning.
            """
            assert self._net is not None
            lengths: list[int] = []
            for number, rows in batch:
                sequence, count = trace.sequences[number], rows.stop - rows.start
                prompt = min(max(sequence.start + sequence.prompt_tokens - rows.start, 0), count)
                written = int(np.ceil((count - prompt) * rng.uniform(_LEAST_PREFIX, 1)))
                lengths.append(prompt + written)
            ids = np.full((len(batch), max(lengths)), UNKNOWN_ID, np.int64)
            real = np.zeros(ids.shape, bool)
            before = np.zeros((len(batch), 1), np.int64)
            source = np.full((len(batch), source_tokens), UNKNOWN_ID, np.int64)
            wanted: list[Array] = []
            for i, (count, (number, rows)) in enumerate(zip(lengths, batch, strict=True)):
                sequence, own = trace.sequences[number], slice(rows.start, rows.start + count)
                ids[i, :count], real[i, :count] = known[own], True
                before[i] = rows.start - sequence.start
                first = known[sequence.rows][:source_tokens]
                source[i, : len(first)] = first
                wanted.append(multi_hot(trace.experts[own], trace.num_experts).reshape(count, -1))
            past = PathPast(tokens=torch.from_numpy(before), read=torch.from_numpy(source))
            logits, _ = self._net(torch.from_numpy(ids), past)
            return functional.binary_cross_entropy_with_logits(
                logits[torch.from_numpy(real)],
                torch.from_numpy(np.concatenate(wanted)),
                reduction="sum",
            ) / sum(lengths)

        return loss


def count_parameters(net: T5PathNet) -> int:
    """Of tables and transformer, the head's apart, as the paper counts."""
    return sum(p.numel() for p in net.parameters()) - net.head.weight.numel()


def _mask(seen: torch.Tensor) -> torch.Tensor:
    """Who sees whom, bool `[T, M]` or `[B, T, M]`, as what T5 adds to its scores, for all heads."""
    return torch.where(seen, 0.0, _MASKED).view(-1, 1, *seen.shape[-2:])


def _without_oldest(kept: Kept, drop: int) -> Kept:
    """Keys and values but for the oldest `drop`, whose memory goes with them."""
    if drop <= 0:
        return kept
    return tuple((keys[:, :, drop:].clone(), values[:, :, drop:].clone()) for keys, values in kept)
