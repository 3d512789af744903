"""Who the next layers will use: an MLP per layer on ids and history."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional

from sluice.predict.arrays import multi_hot
from sluice.predict.base import BasePredictor, Progress
from sluice.predict.live import Request
from sluice.predict.networks.history import routes_as_ones
from sluice.predict.networks.layer_head import REACH, LayerHead, States
from sluice.predict.networks.neighbours import (
    Alike,
    LiveAlike,
    Looking,
    MemorySettings,
    Stretch,
    average_over_alike,
)
from sluice.predict.networks.training import (
    Descent,
    check_ranges,
    load_module,
    module_state,
    seeded,
)
from sluice.predict.networks.usage import Usage, advance, at_sequence_start
from sluice.predict.offline import Horizon, known_layers
from sluice.trace import Trace

Array = NDArray[Any]

Block = tuple[slice, dict[tuple[int, int], torch.Tensor], torch.Tensor]
"""Rows, who alike tokens used by (layer, layers known), `[B, E]` each, and how sure."""
_ROWS = 128


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerMlpSettings(MemorySettings):
    """How large, how long, how far; how much it remembers, as `MemorySettings`.

    Args:
        max_layers: Layers ahead that routes and states of the running token are read for; what is
            further is predicted from before the token.
        hidden: Width of a layer's MLP.
        units: Width of what reads one expert's features.
        dropout: Of the hidden layer in training; of the routes it reads, half.
        epochs: Passes; with sequences to choose on the best one is kept.
        learning_rate: Of AdamW, annealed to nothing.
        weight_decay: Of AdamW.
    """

    max_layers: int = 3
    hidden: int = 96
    units: int = 16
    dropout: float = 0.2
    epochs: int = 12
    learning_rate: float = 2e-3
    weight_decay: float = 0.01
    previous: float = 5.0

    def __post_init__(self) -> None:
        check_ranges(
            self,
            at_least_one=("max_layers", "hidden", "units", "epochs", "memory_tokens"),
            shares=("dropout",),
        )
        self.check_memory()


@dataclass(slots=True)
class _Memory:
    """What a request's stream is known for.

    Attributes:
        usage: After its last finished token.
        features: `[1, S, E, F]` of that token, as the next one reads them.
        overlap: Of that token with every column, or None.
        column: Where it lies among the columns, -1 for nowhere.
        looking: Comparison of the running token.
        alike: Per stage from -1 on, who is alike.
    """

    usage: Usage
    features: torch.Tensor
    overlap: Array | None = None
    column: int = -1
    looking: Looking | None = None
    alike: list[Alike] = field(default_factory=list[Alike])


class LayerMlp(BasePredictor[LayerMlpSettings]):
    """`LayerHead` on routes of up to six layers before, history, and who alike tokens used.

    Trained for 1 to `max_layers` layers ahead and for "before layer 0", all in one.

    Source: ProMoE (2410.22134) for an MLP per layer; that it works from ids, and the memory of
    alike tokens, are this project's.
    """

    name = "layer-mlp"
    settings_type = LayerMlpSettings
    sequences_apart = False

    _head: LayerHead | None = None
    _rows: Stretch | None = None
    _alike: LiveAlike | None = None
    _latest: _Memory | None = None

    # For subclasses that read states

    def _width(self, trace: Trace) -> int:
        """H, 0 where no states are read."""
        return 0

    def _saved_width(self, arrays: Mapping[str, Array]) -> int:
        """H of what `state` gave."""
        return 0

    def _states(self, trace: Trace, rows: Any, known: Array) -> States | None:
        """Of rows of a trace, for all layers."""
        return None

    def _states_of(self, request: Request, layers: Array, known: Array) -> States | None:
        """Of the running token."""
        return None

    # Offline

    def scores(self, trace: Trace, horizon: Horizon) -> Array:
        """As the base says."""
        self.check(trace)
        ahead, known = self._reach(known_layers(horizon, trace.num_layers))
        if self._head is None or self._rows is None:
            return np.zeros((*trace.experts.shape[:2], trace.num_experts), np.float32)
        return self._scores(trace, ahead, known, self._compared(trace, known))

    def _scores(self, trace: Trace, ahead: Array, known: Array, blocks: Iterable[Block]) -> Array:
        """Probabilities `[N, S, E]` from what `_compared` gave."""
        assert self._head is not None
        found = np.empty((*trace.experts.shape[:2], trace.num_experts), np.float32)
        layers = np.arange(trace.num_layers)
        usage = _walk(trace)
        with torch.no_grad():
            for rows, averages, sure in blocks:
                alike = torch.stack([averages[s, int(count)] for s, count in enumerate(known)])
                logits = self._head(
                    slice(0, trace.num_layers),
                    torch.from_numpy(ahead),
                    routes=_routes(trace, rows, layers, known),
                    features=_features(usage(rows), layers, alike),
                    sure=sure[:, known].transpose(0, 1),
                    states=self._states(trace, rows, known),
                )
                found[rows] = logits.sigmoid().transpose(0, 1).numpy()
        return found

    def _compared(self, trace: Trace, known: Array) -> Iterator[Block]:
        """Who tokens alike used, per layer with as many known as it is given."""
        return self._averages(trace, {(s, int(count)) for s, count in enumerate(known)})

    def _reach(self, known: Array) -> tuple[Array, Array]:
        """How far ahead each layer is (0: too far), and how many layers are read for it."""
        ahead = np.arange(len(known)) - known + 1
        ahead = np.where(ahead <= self.settings.max_layers, ahead, 0)
        return ahead, np.where(ahead > 0, known, 0)

    def _averages(
        self,
        trace: Trace,
        wanted: set[tuple[int, int]],
        *,
        leave_out: bool = False,
    ) -> Iterator[Block]:
        """Who tokens alike used, for (layer, known layers) as wanted: `[B, E]` each."""
        memory, stream = self._rows, Stretch.of(trace)
        assert memory is not None
        used = torch.cat([memory.used(), stream.used()])
        layers_at: dict[int, list[int]] = {}
        for layer, known in sorted(wanted):
            layers_at.setdefault(known - 1, []).append(layer)

        def worth(stage: int) -> torch.Tensor | None:
            layers = layers_at.get(stage)
            return None if layers is None else used[:, layers].flatten(1).float()

        settings = self.settings
        for rows, averages, sure in average_over_alike(
            stream,
            memory,
            settings.likeness,
            worth,
            recent=settings.recent_tokens,
            wait=0,
            leave_out=leave_out,
        ):
            found: dict[tuple[int, int], torch.Tensor] = {}
            for stage, layers in layers_at.items():
                each = averages[stage].unflatten(1, (len(layers), -1))
                found |= {(layer, stage + 1): each[:, i] for i, layer in enumerate(layers)}
            yield rows, found, sure

    # Fitting

    def _fit(
        self, trace: Trace, choose: Trace | None, seed: int, progress: Progress
    ) -> Mapping[str, Any] | None:
        settings = self.settings
        rng = np.random.default_rng(seed)
        self._rows = Stretch.drawn(trace, settings.memory_tokens, rng)
        horizons: list[Horizon] = [*range(1, settings.max_layers + 1), "token"]
        plans = [self._reach(known_layers(each, trace.num_layers)) for each in horizons]
        wanted = {(s, int(known[s])) for _, known in plans for s in range(trace.num_layers)}
        parts = [
            ({key: each.half() for key, each in averages.items()}, sure)
            for _, averages, sure in self._averages(trace, wanted, leave_out=True)
        ]
        alike = {key: torch.cat([part[0][key] for part in parts]) for key in wanted}
        certain = torch.cat([part[1] for part in parts])
        usage = _walk(trace)(slice(0, trace.num_tokens)).half()
        used = torch.from_numpy(multi_hot(trace.experts, trace.num_experts).astype(np.uint8))
        layers = np.arange(trace.num_layers)
        compared = [] if choose is None else list(self._compared(choose, plans[0][1]))
        notes: dict[str, Any] = {"loss": [], "choose_recall": []}
        with seeded(seed):
            head = LayerHead(
                trace.num_layers,
                trace.num_experts,
                self._width(trace),
                ahead=settings.max_layers,
                hidden=settings.hidden,
                units=settings.units,
                dropout=settings.dropout,
            )
            batches = -(-trace.num_tokens // _ROWS)
            descent = Descent(head, settings, settings.epochs * batches)
            for epoch in range(settings.epochs):
                head.train()
                for some in np.array_split(rng.permutation(trace.num_tokens), batches):
                    # Half of the batches one layer ahead, where most is asked.
                    ahead, known = plans[0 if rng.random() < 0.5 else rng.integers(len(plans))]
                    rows = torch.from_numpy(some)
                    near = torch.stack(
                        [alike[s, int(n)][rows].float() for s, n in enumerate(known)]
                    )
                    logits = head(
                        slice(0, trace.num_layers),
                        torch.from_numpy(ahead),
                        routes=_routes(trace, some, layers, known),
                        features=_features(usage[rows].float(), layers, near),
                        sure=certain[rows][:, known].transpose(0, 1),
                        states=self._states(trace, some, known),
                    )
                    targets = used[rows].float().transpose(0, 1)
                    descent.step(functional.binary_cross_entropy_with_logits(logits, targets))
                head.eval()
                self._head = head
                notes["loss"].append(descent.mean_loss())
                # The first passes are never the best: they are not worth the look.
                if choose is not None and 2 * epoch >= settings.epochs - 2:
                    recall = _recall(self._scores(choose, *plans[0], compared), choose)
                    notes["choose_recall"].append(recall)
                    if descent.keep_if_best(-recall):
                        notes["best_epoch"] = epoch
                progress(epoch + 1, settings.epochs)
        descent.restore_best()
        self.reset()
        return notes

    # State

    def state(self) -> dict[str, Array]:
        """The layers as `LayerHead` names them, and the memory's rows."""
        assert self._head is not None and self._rows is not None
        return {
            **module_state(self._head),
            "memory.routes": self._rows.routes,
            "memory.sequence": self._rows.sequence,
        }

    def load_state(self, arrays: Mapping[str, Array]) -> None:
        """Takes what `state` gave."""
        assert self.shape is not None
        shape, settings = self.shape, self.settings
        head = LayerHead(
            shape.num_layers,
            shape.num_experts,
            self._saved_width(arrays),
            ahead=settings.max_layers,
            hidden=settings.hidden,
            units=settings.units,
            dropout=settings.dropout,
        )
        load_module(head, arrays)
        self._head = head.eval()
        self._rows = Stretch.of_state(arrays, shape)
        self.reset()

    # Live

    def reset(self) -> None:
        """Forgets the running text; what was fitted stays."""
        super().reset()
        self._alike = self._latest = None

    def _begin(self, request: Request) -> None:
        assert self.shape is not None
        layers, experts = self.shape.num_layers, self.shape.num_experts
        if self._latest is None:
            usage = Usage.nothing(layers, experts)
        else:  # one text goes on where another ended
            usage = self._latest.usage.new_sequence()
        features = _nothing(layers, experts) if self._latest is None else self._latest.features
        request.memory = _Memory(usage, at_sequence_start(features.clone()))

    def _predict(self, request: Request, first: int, stop: int) -> Array:
        assert self.shape is not None
        if self._head is None:
            return np.zeros((stop - first, self.shape.num_experts), np.float32)
        memory: _Memory = request.memory
        self._look(request)
        layers = np.arange(first, stop)
        ahead = layers - request.layer + 1
        ahead = np.where(ahead <= self.settings.max_layers, ahead, 0)
        known = np.where(ahead > 0, request.layer, 0)
        assert self._alike is not None
        near, sure = self._near(memory, layers, known)
        routes = _routes_of(
            torch.from_numpy(request.routes[None]),
            torch.from_numpy(request.weights[None]),
            self.shape.num_experts,
            layers,
            known,
        )
        with torch.no_grad():
            logits = self._head(
                slice(first, stop),
                torch.from_numpy(ahead),
                routes=routes,
                features=_features(memory.features, layers, near),
                sure=sure,
                states=self._states_of(request, layers, known),
            )
        return logits[:, 0].sigmoid().numpy()

    def _near(
        self, memory: _Memory, layers: Array, known: Array
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Who alike tokens used at the layers, `[n, 1, E]`, and how sure, `[n, 1, 2]`."""
        assert self._alike is not None
        near = np.empty((len(layers), 1, self._alike.used.shape[1]), np.float32)
        sure = np.empty((len(layers), 1, 2), np.float32)
        for i, (layer, count) in enumerate(zip(layers, known, strict=True)):
            found = memory.alike[count]
            near[i, 0] = self._alike.used[layer][:, found.columns] @ found.weights
            sure[i, 0] = found.sure
        return torch.from_numpy(near), torch.from_numpy(sure)

    def _look(self, request: Request) -> None:
        """Compares as far as the token has routed."""
        memory: _Memory = request.memory
        if self._alike is None:
            assert self._rows is not None
            settings = self.settings
            likeness = settings.likeness
            self._alike = LiveAlike(self._rows, likeness, settings.recent_tokens)
        if memory.looking is None:
            memory.looking = self._alike.begin(memory.overlap if request.tokens else None)
            memory.alike = [self._alike.find(memory.looking)]
        for layer in range(len(memory.alike) - 1, request.layer):
            self._alike.advance(memory.looking, layer, request.routes[layer])
            memory.alike.append(self._alike.find(memory.looking))

    def _give_up(self, request: Request) -> None:
        request.memory.looking = None

    def _finish(self, request: Request) -> None:
        if self._head is None or self.shape is None:
            return
        memory: _Memory = request.memory
        self._look(request)
        assert memory.looking is not None and self._alike is not None
        memory.overlap = memory.looking.overlap
        memory.looking, memory.alike = None, []
        memory.column = self._alike.add(request.routes, memory.column)
        wide = self.shape.num_experts
        routes = torch.from_numpy(request.routes[None])
        memory.features, memory.usage = advance(
            memory.usage,
            routes_as_ones(routes, torch.ones(routes.shape), wide),
            routes_as_ones(routes, torch.from_numpy(request.weights[None]), wide),
            torch.tensor([False]),
        )
        self._latest = memory


def _nothing(layers: int, experts: int) -> torch.Tensor:
    """Usage features before the first token of all."""
    nobody = torch.zeros(1, layers, experts)
    features, _ = advance(Usage.nothing(layers, experts), nobody, nobody, torch.tensor([True]))
    return features


def _walk(trace: Trace) -> Any:
    """A function from consecutive rows to the usage features before them, `[B, S, E, F]`."""
    usage = Usage.nothing(trace.num_layers, trace.num_experts)
    last = _nothing(trace.num_layers, trace.num_experts)
    starts = np.zeros(trace.num_tokens, bool)
    starts[[s.start for s in trace.sequences]] = True

    def read(rows: slice) -> torch.Tensor:
        nonlocal usage, last
        experts = torch.from_numpy(trace.experts[rows])
        used = routes_as_ones(experts, torch.ones(experts.shape), trace.num_experts)
        weights = torch.zeros_like(used)
        if trace.weights is not None:
            weights = routes_as_ones(
                experts, torch.from_numpy(trace.weights[rows]), trace.num_experts
            )
        begins = torch.from_numpy(starts[rows])
        features, usage = advance(usage, used, weights, begins)
        before = torch.cat([last, features[:-1]])
        last = features[-1:]
        before[begins] = at_sequence_start(before[begins])
        return before

    return read


def _routes(trace: Trace, rows: Any, layers: Array, known: Array) -> torch.Tensor:
    """`[n, B, REACH·2·E]` of the layers that are known."""
    experts = torch.from_numpy(trace.experts[rows])
    weights = torch.zeros(experts.shape)
    if trace.weights is not None:
        weights = torch.from_numpy(trace.weights[rows])
    return _routes_of(experts, weights, trace.num_experts, layers, known)


def _routes_of(
    experts: torch.Tensor, weights: torch.Tensor, num_experts: int, layers: Array, known: Array
) -> torch.Tensor:
    ones = routes_as_ones(experts, torch.ones(experts.shape), num_experts)
    both = torch.cat([ones, 4 * routes_as_ones(experts, weights, num_experts)], -1)
    wide = both.shape[-1]
    routes = torch.zeros(len(layers), len(experts), REACH * wide)
    for i, (layer, count) in enumerate(zip(layers, known, strict=True)):
        for back in range(1, min(REACH, layer) + 1):
            if layer - back < count:
                routes[i, :, (back - 1) * wide : back * wide] = both[:, layer - back]
    return routes


def _features(before: torch.Tensor, layers: Array, near: torch.Tensor) -> torch.Tensor:
    """`[n, B, E, F + 1]` of usage `[B, S, E, F]` and who is near `[n, B, E]`."""
    usage = before[:, torch.from_numpy(layers)].transpose(0, 1)
    return torch.cat([usage, near.clamp(min=0).sqrt()[..., None]], -1)


def _recall(scores: Array, trace: Trace) -> float:
    """Share of a token's experts among the K best, layers ≥ 1 (all where there is but one)."""
    first = min(1, trace.num_layers - 1)
    best = np.argpartition(-scores[:, first:], trace.top_k - 1, axis=-1)[..., : trace.top_k]
    hit = np.take_along_axis(multi_hot(trace.experts, trace.num_experts)[:, first:], best, -1)
    return float(hit.sum() / max((trace.experts[:, first:] >= 0).sum(), 1))
