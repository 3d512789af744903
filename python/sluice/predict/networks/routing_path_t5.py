"""ExpertFlow's routing-path predictor in the paper's own shape: T5's encoder and decoder."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.nn import functional

from sluice.predict.arrays import ids_of, multi_hot
from sluice.predict.base import BasePredictor, Progress
from sluice.predict.live import Request
from sluice.predict.networks.routing_path import (
    HASHES,
    UNKNOWN_ID,
    batches_of,
    cross_entropy,
    hashed,
    pieces_of,
)
from sluice.predict.networks.training import (
    Descent,
    check_ranges,
    load_module,
    module_state,
    seeded,
)
from sluice.predict.offline import Horizon, known_layers
from sluice.trace import Trace

Array = NDArray[Any]

_START_ID = -2
_HIDDEN = torch.finfo(torch.float32).min
_LEAST_PREFIX = 0.2
_ROWS = 512


@dataclass(frozen=True, slots=True, kw_only=True)
class RoutingPathT5Settings:
    """How large and how long; the defaults' skeleton is the paper's, its table is not.

    Args:
        width: d_model.
        inner: d_ff.
        layers: Of the encoder, and of the decoder again.
        heads: Of each attention.
        head_width: d_kv; T5 does not tie it to the width.
        vocabulary: Rows of one table of token ids, ids beyond it unknown: the paper's is 32128.
            0: ids are hashed into two tables, whose sum stands for an id, so that the size does
            not depend on the vocabulary.
        table_rows: Of each of the two tables.
        source_tokens: First tokens of a sequence that the encoder reads, once they have passed.
        window: Tokens that one sees, itself included, per layer; it bounds what a request keeps,
            25 KB a token. T5 tells no distances of 128 and more apart.
        dropout: In training.
        epochs: Passes; with sequences to choose on the best one is kept.
        sequence_tokens: Length of the stretches that are trained on.
        batch_tokens: Tokens of a training step.
        learning_rate: Of AdamW, annealed to nothing.
        weight_decay: Of AdamW.
    """

    width: int = 32
    inner: int = 2048
    layers: int = 6
    heads: int = 8
    head_width: int = 64
    vocabulary: int = 0
    table_rows: int = 16384
    source_tokens: int = 32
    window: int = 128
    dropout: float = 0.1
    epochs: int = 12
    sequence_tokens: int = 256
    batch_tokens: int = 256
    learning_rate: float = 3e-4
    weight_decay: float = 0.01

    def __post_init__(self) -> None:
        check_ranges(
            self,
            at_least_one=(
                *("width", "inner", "layers", "heads", "head_width", "table_rows"),
                *("source_tokens", "window", "epochs", "sequence_tokens", "batch_tokens"),
                *(("vocabulary",) if self.vocabulary != 0 else ()),
            ),
            shares=("dropout",),
        )


Kept = tuple[tuple[torch.Tensor, torch.Tensor], ...]
"""Keys and values per layer, each `[B, heads, W, head_width]`."""


@dataclass(frozen=True, slots=True)
class PathPast:
    """What the decoder keeps of tokens that went through it.

    Attributes:
        tokens: How many went through in all.
        read: int64 `[B, ≤ source_tokens]`, ids of the first of them.
        source: The encoder's states `[B, M, width]`: M is 1, the start symbol alone, until
            `source_tokens` have passed, then 1 + `source_tokens`.
        own: Of the last `window - 1` tokens.
        cross: Of `source`.
        caches: transformers' classes for both together and for each.
    """

    tokens: int = 0
    read: torch.Tensor | None = None
    source: torch.Tensor | None = None
    own: Kept = ()
    cross: Kept = ()
    caches: tuple[Any, Any] | None = None


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
        from sluice.hf.t5 import new_t5

        model = new_t5(
            vocabulary=settings.vocabulary or settings.table_rows,
            width=settings.width,
            inner=settings.inner,
            layers=settings.layers,
            heads=settings.heads,
            head_width=settings.head_width,
            dropout=settings.dropout,
        )
        self.tables = nn.ModuleList([model.shared])
        if not settings.vocabulary:
            self.tables.append(nn.Embedding(settings.table_rows, settings.width))  # N(0, 1), as T5
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
        place = torch.arange(past.tokens, past.tokens + tokens)
        late = place >= settings.source_tokens
        source, cross = past.source, past.cross
        width = 1 + settings.source_tokens if bool(late[-1]) else 1
        if source is None or source.shape[1] != width:
            source, cross = self._encode(read[:, : width - 1]), ()
        kept = past.own[0][0].shape[2] if past.own else 0
        distance = place[:, None] - torch.arange(past.tokens - kept, past.tokens + tokens)
        cache = None
        if past.caches is not None:
            both, each = past.caches
            cache = both(each(past.own), each(cross))
        # By position: the cache's name differs between releases of transformers.
        output = self.decoder(
            None,
            _mask((distance >= 0) & (distance < settings.window)),
            source,
            _mask(late[:, None] | (torch.arange(width) == 0)),
            self._embed(ids),
            cache,
        )
        cache = output[1]
        after = PathPast(
            tokens=past.tokens + tokens,
            read=read,
            source=source,
            own=_kept(cache.self_attention_cache, kept + tokens - settings.window + 1),
            cross=_kept(cache.cross_attention_cache, 0),
            caches=(type(cache), type(cache.self_attention_cache)),
        )
        return self.head(output[0]), after

    def _encode(self, ids: torch.Tensor) -> torch.Tensor:
        """States `[B, 1 + N, width]` of the start symbol and N ids."""
        symbols = functional.pad(ids, (1, 0), value=_START_ID)
        place = torch.arange(symbols.shape[1])
        seen = _mask((place[:, None] > 0) | (place == 0))
        return self.encoder(inputs_embeds=self._embed(symbols), attention_mask=seen)[0]

    def _embed(self, ids: torch.Tensor) -> torch.Tensor:
        """`[..., width]`; zeros for what is unknown."""
        rows = self.settings.vocabulary
        if rows:
            known = ((ids >= 0) & (ids < rows)) | (ids == _START_ID)
            token = self.tables[0](ids.clamp(0, rows - 1))  # T5 starts with its row 0, the pad
        else:
            known = ids != UNKNOWN_ID
            token = sum(
                table(hashed(ids, *each, self.settings.table_rows))
                for table, each in zip(self.tables, HASHES, strict=True)
            )
        return torch.where(known[..., None], token, 0.0)


@dataclass(slots=True)
class _Memory:
    """What a request's decoder is at.

    Attributes:
        past: Of finished tokens, but for `unread`.
        unread: Ids of finished tokens that did not go through yet.
        trial: The running token's id and what came of it; None before it is asked for.
    """

    past: PathPast = field(default_factory=PathPast)
    unread: list[int] = field(default_factory=list[int])
    trial: tuple[int, Array, PathPast] | None = None


class RoutingPathT5(BasePredictor[RoutingPathT5Settings]):
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

    _net: T5PathNet | None = None

    @property
    def parameters(self) -> int:
        """Numbers that were learnt, the head's apart; 0 before a fit."""
        return 0 if self._net is None else count_parameters(self._net)

    # Offline

    def scores(self, trace: Trace, horizon: Horizon) -> Array:
        """As the base says; known layers of the running token change nothing."""
        self.check(trace)
        known_layers(horizon, trace.num_layers)
        found = np.zeros((*trace.experts.shape[:2], trace.num_experts), np.float32)
        if self._net is None:
            return found
        ids = ids_of(trace)
        for sequence in trace.sequences:
            past, stop = PathPast(), sequence.start + sequence.length
            for begin in range(sequence.start, stop, _ROWS):
                rows = slice(begin, min(begin + _ROWS, stop))
                found[rows], past = self._run(ids[rows], past)
        return found

    def _run(self, ids: Array, past: PathPast) -> tuple[Array, PathPast]:
        """Tokens of one sequence: probabilities `[T, S, E]`."""
        assert self._net is not None and self.shape is not None
        with torch.no_grad():
            logits, past = self._net(torch.from_numpy(ids)[None], past)
            likely = logits[0].sigmoid().numpy()
        return likely.reshape(len(ids), self.shape.num_layers, -1), past

    # Fitting

    def _fit(
        self, trace: Trace, choose: Trace | None, seed: int, progress: Progress
    ) -> Mapping[str, Any] | None:
        settings = self.settings
        rng = np.random.default_rng(seed)
        with seeded(seed):
            self._net = net = T5PathNet(settings, trace.num_layers, trace.num_experts)
            pieces = pieces_of(trace, settings.sequence_tokens)
            lengths = [rows.stop - rows.start for _, rows in pieces]
            together = max(1, round(settings.batch_tokens / float(np.mean(lengths))))
            batches = -(-len(pieces) // together)
            descent = Descent(net, settings, settings.epochs * batches)
            notes: dict[str, Any] = {
                "parameters": count_parameters(net),
                "head_parameters": net.head.weight.numel(),
                "loss": [],
                "choose_loss": [],
            }
            for epoch in range(settings.epochs):
                net.train()
                for batch in batches_of(pieces, together, rng):
                    descent.step(_loss(net, trace, batch, rng))
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
        """The network by its parameters' names."""
        assert self._net is not None
        return module_state(self._net)

    def load_state(self, arrays: Mapping[str, Array]) -> None:
        """Takes what `state` gave."""
        assert self.shape is not None
        net = T5PathNet(self.settings, self.shape.num_layers, self.shape.num_experts)
        load_module(net, arrays)
        self._net = net.eval()

    # Live

    def _begin(self, request: Request) -> None:
        request.memory = _Memory()

    def _predict(self, request: Request, first: int, stop: int) -> Array:
        assert self.shape is not None
        if self._net is None:
            return np.zeros((stop - first, self.shape.num_experts), np.float32)
        memory: _Memory = request.memory
        if memory.trial is None or memory.trial[0] != request.token_id:
            for begin in range(0, len(memory.unread), _ROWS):
                rows = np.array(memory.unread[begin : begin + _ROWS], np.int64)
                _, memory.past = self._run(rows, memory.past)
            memory.unread = []
            likely, after = self._run(np.array([request.token_id], np.int64), memory.past)
            memory.trial = (request.token_id, likely[0], after)
        return memory.trial[1][first:stop]

    def _finish(self, request: Request) -> None:
        memory: _Memory = request.memory
        if memory.trial is not None and memory.trial[0] == request.token_id and not memory.unread:
            memory.past = memory.trial[2]
        elif self._net is not None:
            memory.unread.append(request.token_id)
        memory.trial = None


def count_parameters(net: T5PathNet) -> int:
    """Of tables and transformer, the head's apart, as the paper counts."""
    return sum(p.numel() for p in net.parameters()) - net.head.weight.numel()


def _mask(seen: torch.Tensor) -> torch.Tensor:
    """Who sees whom, bool `[T, M]`, as what T5 adds to its scores: `[1, 1, T, M]`."""
    return torch.where(seen, 0.0, _HIDDEN)[None, None]


def _kept(cache: Any, drop: int) -> Kept:
    """Keys and values of a cache without its oldest `drop`, whose memory goes with them."""
    if drop <= 0:
        return tuple((each.keys, each.values) for each in cache.layers)
    return tuple(
        (each.keys[:, :, drop:].clone(), each.values[:, :, drop:].clone()) for each in cache.layers
    )


def _loss(
    net: T5PathNet, trace: Trace, batch: list[tuple[int, slice]], rng: np.random.Generator
) -> torch.Tensor:
    """Binary cross-entropy, summed over layers and experts, mean over tokens.

    Of what a sequence wrote behind its prompt a random 20 to 100 % is read, from its beginning.
    """
    lengths: list[int] = []
    for number, rows in batch:
        sequence, count = trace.sequences[number], rows.stop - rows.start
        prompt = min(max(sequence.start + sequence.prompt_tokens - rows.start, 0), count)
        lengths.append(prompt + int(np.ceil((count - prompt) * rng.uniform(_LEAST_PREFIX, 1))))
    ids = np.full((len(batch), max(lengths)), UNKNOWN_ID, np.int64)
    real = np.zeros(ids.shape, bool)
    known, wanted = ids_of(trace), list[Array]()
    for i, (count, (_, rows)) in enumerate(zip(lengths, batch, strict=True)):
        own = slice(rows.start, rows.start + count)
        ids[i, :count], real[i, :count] = known[own], True
        wanted.append(multi_hot(trace.experts[own], trace.num_experts).reshape(count, -1))
    logits, _ = net(torch.from_numpy(ids), PathPast())
    return functional.binary_cross_entropy_with_logits(
        logits[torch.from_numpy(real)], torch.from_numpy(np.concatenate(wanted)), reduction="sum"
    ) / sum(lengths)
