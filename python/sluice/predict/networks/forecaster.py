"""A keep-score for every expert of every layer: who will be used again soon, and who will not."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional

from sluice.predict.arrays import multi_hot, take
from sluice.predict.base import BasePredictor, Progress
from sluice.predict.live import Request
from sluice.predict.networks.forecast_head import CONTEXT, ForecastHead
from sluice.predict.networks.futures import DISCOUNTS as RECALLED
from sluice.predict.networks.futures import WINDOW, LiveRecall, recall
from sluice.predict.networks.history import (
    History,
    Inputs,
    context_of,
    routes_as_ones,
    with_recalled,
)
from sluice.predict.networks.misses import misses
from sluice.predict.networks.neighbours import FLOOR, Looking, MemorySettings, Stretch
from sluice.predict.networks.training import (
    Descent,
    check_ranges,
    load_module,
    module_state,
    seeded,
)
from sluice.predict.networks.usage import HALF_LIVES, NEVER, Usage, advance
from sluice.predict.offline import Horizon, known_layers
from sluice.predict.protocol import union_probability
from sluice.trace import Trace

Array = NDArray[Any]

DISCOUNTS = (0.0, 0.5, 0.8, 0.9, 0.95, 0.98)
"""g of the heads' E[g^(next use - 1)], next use in tokens; 0: the probability of the next token."""
Recalled = tuple[slice, torch.Tensor, torch.Tensor]
"""A block of what `recall` yields."""
SHARES = (0.125, 0.25, 0.5)
"""Capacities, as shares of a layer's experts, that a discount is chosen for."""
_DEFAULT_CHOICE = (1, 2, 3)
_FAR = 1024
_CHUNK = 1024
_ROWS = 128


@dataclass(frozen=True, slots=True, kw_only=True)
class ForecasterSettings(MemorySettings):
    """How large, how long; how much it remembers, as `MemorySettings`.

    Args:
        hidden: Width of the layer that reads the token's routes and the text so far.
        units: Width of the layer that reads what is known of one expert.
        dropout: Of the hidden layer in training; of its inputs, half.
        epochs: Passes over the fitted tokens, each in another order of sequences; with sequences to
            choose on the best one is kept.
        learning_rate: Of AdamW, warmed up and annealed to nothing.
        weight_decay: Of AdamW.
    """

    hidden: int = 128
    units: int = 16
    dropout: float = 0.2
    epochs: int = 10
    learning_rate: float = 2e-3
    weight_decay: float = 0.01

    def __post_init__(self) -> None:
        check_ranges(
            self, at_least_one=("hidden", "units", "epochs", "memory_tokens"), shares=("dropout",)
        )
        self.check_memory()


@dataclass(slots=True)
class _Memory:
    """What a request's stream is known for.

    Attributes:
        usage: After its last finished token.
        context: `[1, S * E * 2]`, as `ForecastHead` reads it.
        logits: `[S, E, G]`, per layer as of its newest route.
        overlap: Of the last finished token with every column of the recall, or None.
        column: Where its newest row lies in the recall's ring, -1 for nowhere.
        pending: Finished tokens whose future is not over: routes, and next uses so far.
        looking: Comparison of the running token, made when its first layer is asked for.
        recalled: Per layer of the running token, what the comparison gave.
        done: Layers of the running token that have scores.
        unread: What the head reads of the last finished token, until its scores are asked for.
        next_token: `[S, E]` probabilities of the running token's experts, before its layer 0.
    """

    usage: Usage
    context: torch.Tensor
    logits: torch.Tensor
    overlap: Array | None = None
    column: int = -1
    pending: list[tuple[Array, Array]] = field(default_factory=list[tuple[Array, Array]])
    looking: Looking | None = None
    recalled: list[tuple[Array, Array]] = field(default_factory=list[tuple[Array, Array]])
    done: int = 0
    unread: Inputs | None = None
    next_token: Array | None = None


class Forecaster(BasePredictor[ForecasterSettings]):
    """Ranks residents by E[g^(next use - 1)], how soon each expert is expected back.

    A small network (`ForecastHead`) reads what followed tokens like this one (`recall`), and how
    experts were used so far (`Usage`). The score of (token t, layer s) reads routes of layers ≤ s
    of t and of all earlier tokens, of earlier sequences too. `capacity` says how many experts a
    layer's cache holds; the discount that was best at the nearest share is used (chosen on
    sequences that were set aside).

    Source: SeqMoE (2609.12978) for a forecast over the whole layer stack in place of hints; the
    objective, the memory of futures and the head are this project's.
    """

    name = "forecaster"
    settings_type = ForecasterSettings
    sequences_apart = False
    prompt_tokens = 16  # each costs as much as a written one, and those wait for it

    capacity: int | None = None
    """Experts of a layer that are kept; None: a quarter."""

    _head: ForecastHead | None = None
    _rows: Stretch | None = None
    _choice: tuple[int, ...] = _DEFAULT_CHOICE
    _recall: LiveRecall | None = None
    _latest: _Memory | None = None

    # Offline

    def scores(self, trace: Trace, horizon: Horizon) -> Array:
        """Probability of use, as of after the token before; the horizon changes nothing."""
        self.check(trace)
        known_layers(horizon, trace.num_layers)
        found = np.zeros((*trace.experts.shape[:2], trace.num_experts), np.float32)
        for rows, logits in self._logits(trace):
            stop = min(rows.stop, trace.num_tokens - 1)
            next_token = logits[: stop - rows.start, ..., 0].sigmoid().numpy()
            found[rows.start + 1 : stop + 1] = next_token
        return found

    def keep_scores(self, trace: Trace) -> Array | None:
        """As the base says, for caches of `self.capacity` experts a layer."""
        found = self._ranked(trace, [self.capacity])
        return None if found is None else found[0]

    def keep_scores_of(self, trace: Trace, capacities: Sequence[int]) -> list[Array] | None:
        """`keep_scores` of several capacities, in one pass over the trace."""
        return self._ranked(trace, capacities)

    def _ranked(self, trace: Trace, capacities: Sequence[int | None]) -> list[Array] | None:
        self.check(trace)
        if self._head is None:
            return None
        shape = (*trace.experts.shape[:2], trace.num_experts)
        kept = [np.empty(shape, np.float32) for _ in capacities]
        heads = [self._head_of(capacity) for capacity in capacities]
        for rows, logits in self._logits(trace):
            for scores, head in zip(kept, heads, strict=True):
                scores[rows] = logits[..., head].sigmoid().numpy()
        return kept

    def _logits(
        self, trace: Trace, recalled: Iterable[Recalled] | None = None
    ) -> Iterator[tuple[slice, torch.Tensor]]:
        """`[B, S, E, G]` of all tokens in turn; `recalled` spares a second comparison."""
        if self._head is None or self._rows is None:
            return
        with torch.no_grad():
            history = History(trace)
            for rows, followed, sure in recalled or self._compared(trace):
                for part, inputs in history.read(rows, followed, sure):
                    yield part, self._head(*inputs)

    def _compared(self, trace: Trace) -> Iterator[Recalled]:
        """What followed tokens like a trace's, in the memory and in the trace's own past."""
        assert self._rows is not None
        settings = self.settings
        stream = Stretch.of(trace)
        return recall(stream, self._rows, self.settings.likeness, recent=settings.recent_tokens)

    # Fitting

    def _fit(
        self, trace: Trace, choose: Trace | None, seed: int, progress: Progress
    ) -> Mapping[str, Any] | None:
        settings = self.settings
        self._choice = _DEFAULT_CHOICE
        rng = np.random.default_rng(seed)
        self._rows = Stretch.drawn(trace, settings.memory_tokens, rng)
        followed, sure = self._recalled(trace)
        watched = choose if choose is not None and choose.num_tokens > 1 else None
        compared = [] if watched is None else list(self._compared(watched))
        with seeded(seed):
            head = ForecastHead(
                trace.num_layers,
                trace.num_experts,
                len(DISCOUNTS),
                hidden=settings.hidden,
                units=settings.units,
                dropout=settings.dropout,
            )
            notes: dict[str, Any] = {"loss": [], "choose_misses": []}
            steps = settings.epochs * -(-trace.num_tokens // _ROWS)
            descent = Descent(head, settings, steps)
            for epoch in range(settings.epochs):
                order = _interleaved(trace, rng)
                head.train()
                for inputs, targets in _batches(trace, order, followed, sure):
                    descent.step(
                        functional.binary_cross_entropy_with_logits(head(*inputs), targets)
                    )
                head.eval()
                self._head = head
                notes["loss"].append(descent.mean_loss())
                if watched is not None:
                    chosen, missed = self._choose(watched, compared)
                    notes["choose_misses"].append(missed)
                    if descent.keep_if_best(missed):
                        self._choice = chosen
                        notes["best_epoch"] = epoch
                progress(epoch + 1, settings.epochs)
        descent.restore_best()
        notes["discounts"] = {
            str(share): DISCOUNTS[i] for share, i in zip(SHARES, self._choice, strict=True)
        }
        self.reset()
        return notes

    def _recalled(self, trace: Trace) -> tuple[torch.Tensor, torch.Tensor]:
        """What followed tokens like each fitted one, in the other sequences and its own past."""
        assert self._rows is not None
        stream = Stretch.of(trace)
        blocks = recall(stream, self._rows, self.settings.likeness, recent=0, leave_out=True)
        parts = [(followed.half(), sure) for _, followed, sure in blocks]
        return torch.cat([p[0] for p in parts]), torch.cat([p[1] for p in parts])

    def _choose(self, trace: Trace, recalled: Iterable[Recalled]) -> tuple[tuple[int, ...], float]:
        """The discount per capacity with the fewest misses, and their share of all requests."""
        logits = np.concatenate([each.numpy() for _, each in self._logits(trace, recalled)])
        counts = [
            misses(trace.experts, logits, _capacity(share, trace.num_experts)) for share in SHARES
        ]
        requests = max(int((trace.experts >= 0).sum()), 1)
        missed = float(np.mean([count.min() / requests for count in counts]))
        return tuple(int(count.argmin()) for count in counts), missed

    def _head_of(self, capacity: int | None) -> int:
        """Which head ranks for a cache of that many experts a layer."""
        assert self.shape is not None
        share = SHARES[1] if capacity is None else capacity / self.shape.num_experts
        return self._choice[int(np.argmin(np.abs(np.log(SHARES) - np.log(max(share, 1e-6)))))]

    # State

    def state(self) -> dict[str, Array]:
        """The head's layers as `ForecastHead` names them, the memory's rows, the chosen heads."""
        assert self._head is not None and self._rows is not None
        return {
            **module_state(self._head),
            "memory.routes": self._rows.routes,
            "memory.sequence": self._rows.sequence,
            "choice": np.asarray(self._choice, np.int64),
        }

    def load_state(self, arrays: Mapping[str, Array]) -> None:
        """Takes what `state` gave."""
        assert self.shape is not None
        shape, settings = self.shape, self.settings
        # First, so that nothing is made as large as a card only claims to be.
        take(arrays, "prefix", (shape.num_layers, shape.num_experts, settings.hidden))
        take(arrays, "gate", (shape.num_layers, settings.hidden, settings.units))
        head = ForecastHead(
            shape.num_layers,
            shape.num_experts,
            len(DISCOUNTS),
            hidden=settings.hidden,
            units=settings.units,
            dropout=settings.dropout,
        )
        load_module(head, arrays)
        self._head = head.eval()
        choice = take(arrays, "choice", (len(SHARES),), np.int64)
        self._rows = Stretch.of_state(arrays, shape)
        self._choice = tuple(int(i) for i in np.clip(choice, 0, len(DISCOUNTS) - 1))
        self.reset()

    def core_tables(self) -> tuple[str, dict[str, Any]] | None:
        """What the core's scorer needs to rank inside of forwards, for caches of `capacity`."""
        if self._head is None or self._rows is None or self.shape is None:
            return None
        settings = self.settings
        return "forecast", {
            **self._head.core_tables((0, self._head_of(self.capacity))),
            "num_layers": self.shape.num_layers,
            "num_experts": self.shape.num_experts,
            "top_k": self.shape.top_k,
            "prompt_tokens": self.prompt_tokens,
            "memory.routes": self._rows.routes,
            "memory.sequence": self._rows.sequence,
            "recent": settings.recent_tokens,
            "running": settings.running,
            "previous": settings.previous,
            "fade": settings.fade,
            "floor": FLOOR,
            "window": WINDOW,
            "discounts": np.asarray(RECALLED, np.float32),
            "half_lives": np.asarray(HALF_LIVES, np.float32),
            "never": float(NEVER),
            "context": np.asarray(CONTEXT, np.int32),
        }

    # Live

    def reset(self) -> None:
        """Forgets the running text; what was fitted stays."""
        super().reset()
        self._recall = self._latest = None

    def forecast(self) -> Array | None:
        """Keep-scores of all layers, each as of its newest route, joined over running requests."""
        if self._head is None or self.shape is None:
            return None
        running = [request for request in self._requests().running if request.decoding]
        memories = [self._read(request) for request in running]
        if not memories and self._latest is not None:
            memories = [self._settled(self._latest)]
        if not memories:
            return None
        head = self._head_of(self.capacity)
        kept = np.stack([memory.logits[..., head].sigmoid().numpy() for memory in memories])
        return kept[0] if len(kept) == 1 else union_probability(kept).astype(np.float32)

    def _begin(self, request: Request) -> None:
        assert self.shape is not None
        layers, experts = self.shape.num_layers, self.shape.num_experts
        if self._latest is None:
            request.memory = _Memory(
                usage=Usage.nothing(layers, experts),
                context=torch.zeros(1, layers * experts * len(CONTEXT)),
                logits=torch.full((layers, experts, len(DISCOUNTS)), -torch.inf),
            )
            return
        latest = self._settled(self._latest)  # one text goes on where another ended
        context = latest.context.clone()
        context[:, ::2] = 0.0
        request.memory = _Memory(latest.usage.new_sequence(), context, latest.logits.clone())
        request.memory.next_token = latest.next_token

    def _predict(self, request: Request, first: int, stop: int) -> Array:
        assert self.shape is not None
        ahead = self._settled(request.memory).next_token
        if ahead is None:
            return np.zeros((stop - first, self.shape.num_experts), np.float32)
        return ahead[first:stop]

    def _finish(self, request: Request) -> None:
        memory: _Memory = request.memory
        if self._head is None:
            return
        used, weights = self._routes(request)
        self._look(request)
        features, memory.usage = advance(memory.usage, used, weights, torch.tensor([False]))
        memory.unread = (
            memory.context,
            torch.tensor([float(request.tokens)]),
            used,
            *self._recalled_of(memory, features, 0),
        )
        memory.context = context_of(features)
        assert memory.looking is not None
        memory.overlap = memory.looking.overlap
        memory.looking, memory.recalled, memory.done = None, [], 0
        self._remember(memory, request.routes)
        self._latest = memory

    def _leave(self, request: Request) -> None:
        """Its text has ended, for all that is known: what is pending gets no more future."""
        memory: _Memory = request.memory
        while memory.pending:
            self._hand_over(memory)

    def _read(self, request: Request) -> _Memory:
        """Its memory, with scores of all layers that have routed."""
        memory = self._settled(request.memory)
        if self._head is None or memory.done >= request.layer:
            return memory
        layers = slice(memory.done, request.layer)
        self._look(request)
        used, weights = self._routes(request)
        features, _ = advance(
            memory.usage.at(layers.start, layers.stop),
            used[:, layers],
            weights[:, layers],
            torch.tensor([False]),
        )
        with torch.no_grad():
            found = self._head(
                memory.context,
                torch.tensor([float(request.tokens)]),
                used,
                *self._recalled_of(memory, features, layers.start),
            )
        memory.logits = memory.logits.clone()
        memory.logits[layers] = found[0]
        memory.done = request.layer
        return memory

    def _settled(self, memory: _Memory) -> _Memory:
        """The same, with scores of its last finished token: a prompt needs but its last."""
        if memory.unread is not None and self._head is not None:
            with torch.no_grad():
                memory.logits = self._head(*memory.unread)[0]
            memory.next_token = memory.logits[..., 0].sigmoid().numpy()
            memory.unread = None
        return memory

    def _look(self, request: Request) -> None:
        """Compares the layers that have routed and were not compared yet."""
        memory: _Memory = request.memory
        if self._recall is None:
            assert self._rows is not None
            self._recall = LiveRecall(
                self._rows, self.settings.likeness, self.settings.recent_tokens
            )
        if memory.looking is None:
            memory.looking = self._recall.begin(memory.overlap if request.tokens else None)
        for layer in range(len(memory.recalled), request.layer):
            memory.recalled.append(self._recall.look(memory.looking, layer, request.routes[layer]))

    def _routes(self, request: Request) -> tuple[torch.Tensor, torch.Tensor]:
        """Routes and weights of its running token as `[1, layers so far, E]`."""
        assert self.shape is not None
        experts = torch.from_numpy(request.routes[None, : request.layer])
        weights = torch.from_numpy(request.weights[None, : request.layer])
        wide = self.shape.num_experts
        return (
            routes_as_ones(experts, torch.ones(experts.shape), wide),
            routes_as_ones(experts, weights, wide),
        )

    def _recalled_of(
        self, memory: _Memory, features: torch.Tensor, first: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        recalled = memory.recalled[first : first + features.shape[1]]
        followed = torch.from_numpy(np.stack([each[0] for each in recalled])[None])
        sure = torch.from_numpy(np.stack([each[1] for each in recalled])[None])
        return with_recalled(features, followed), sure

    def _remember(self, memory: _Memory, routes: Array) -> None:
        """A finished token is the future of those before it, and waits for its own."""
        assert self.shape is not None
        used = multi_hot(routes, self.shape.num_experts).astype(bool)
        for ahead, (_, next_uses) in enumerate(reversed(memory.pending), start=1):
            next_uses[used & (next_uses == 0)] = ahead
        memory.pending.append((routes, np.zeros(used.shape, np.uint8)))
        if len(memory.pending) > WINDOW:
            self._hand_over(memory)

    def _hand_over(self, memory: _Memory) -> None:
        routes, next_uses = memory.pending.pop(0)
        if self._recall is not None:
            memory.column = self._recall.add_with_future(routes, next_uses, memory.column)


def _interleaved(trace: Trace, rng: np.random.Generator) -> list[int]:
    """All sequences, drawn so that the tasks' tokens stay level: what a mixed stream is like."""
    waiting: dict[str, list[int]] = {}
    for i in rng.permutation(len(trace.sequences)):
        waiting.setdefault(trace.sequences[i].task, []).append(int(i))
    tokens = dict.fromkeys(waiting, 0)
    order: list[int] = []
    while waiting:
        task = min(waiting, key=lambda each: tokens[each])
        order.append(waiting[task].pop())
        tokens[task] += trace.sequences[order[-1]].length
        if not waiting[task]:
            del waiting[task]
    return order


def _batches(
    trace: Trace, order: list[int], followed: torch.Tensor, sure: torch.Tensor
) -> Iterator[tuple[Inputs, torch.Tensor]]:
    """What the head reads and should say, sequences in this order, batches of shuffled tokens."""
    stream = trace.select(order)
    rows = np.concatenate(
        [np.arange(s.start, s.start + s.length) for s in (trace.sequences[i] for i in order)]
    )
    table = torch.tensor([[g ** float(d) for g in DISCOUNTS] for d in range(_FAR + 1)])
    next_uses = _next_uses(stream)
    history = History(stream)
    for begin in range(0, len(rows), _CHUNK):
        part = slice(begin, min(begin + _CHUNK, len(rows)))
        picked = torch.from_numpy(rows[part])
        read = [inputs for _, inputs in history.read(part, followed[picked], sure[picked])]
        inputs = [torch.cat(each) for each in zip(*read, strict=True)]
        shuffled = torch.randperm(len(picked))
        for first in range(0, len(picked), _ROWS):
            some = shuffled[first : first + _ROWS]
            wanted = table[torch.from_numpy(next_uses[part][some.numpy()]).long()]
            context, position, used, features, certain = (each[some] for each in inputs)
            yield (context, position, used, features, certain), wanted


def _next_uses(trace: Trace) -> Array:
    """int16 `[N, S, E]`: tokens until the next use, less one, over sequences; at most `_FAR`."""
    found = np.empty((*trace.experts.shape[:2], trace.num_experts), np.int16)
    ahead = np.full(found.shape[1:], _FAR, np.int16)
    used = multi_hot(trace.experts, trace.num_experts).astype(bool)
    for row in range(trace.num_tokens - 1, -1, -1):
        found[row] = ahead
        ahead = np.minimum(ahead + 1, _FAR).astype(np.int16)
        ahead[used[row]] = 0
    return found


def _capacity(share: float, num_experts: int) -> int:
    return max(1, round(share * num_experts))
