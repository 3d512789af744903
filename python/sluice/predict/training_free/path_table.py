"""EdgeMoE's table of activation paths: the experts of two layers tell those of the next.

Source: EdgeMoE, 2308.14352 §III-C1. Order-free keys, the back-off and what a token's
first layers read are readings of this project where the paper is silent.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sluice.errors import ConfigError
from sluice.predict.arrays import multi_hot, take
from sluice.predict.base import BasePredictor, Progress
from sluice.predict.live import Request
from sluice.predict.offline import Horizon, known_layers, previous_routes
from sluice.predict.training_free.counting import check_rates, expert_rates
from sluice.predict.training_free.decayed import (
    LIFT_HALF_LIFE,
    DecayedCounts,
    check_positive,
    lift_trace,
)
from sluice.predict.training_free.keyed import KeyedRates
from sluice.trace import Trace

Array = NDArray[Any]

_PAIRS_FROM = 32
"""From so many experts on, sets are too many to be keys, and single experts vote."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PathTableSettings:
    """How to count, and whether to follow the running sequence.

    Args:
        keys: "sets": the sets of experts of the two layers before are one key, backed off to the
            last layer's set, then to the layer's rates. "pairs": the mean of `P(e | a)` over the
            experts a of the layer before. "auto": pairs from 32 experts on.
        back_off: Weight of what a rate backs off to, in occurrences.
        max_keys: Sets that are kept, of one and of two layers each; the rarest are dropped.
        adapt: Raise what the running sequence uses more than others do, and lower what it does not.
    """

    keys: str = "auto"
    back_off: float = 4.0
    max_keys: int = 65536
    adapt: bool = False

    def __post_init__(self) -> None:
        if self.keys not in ("auto", "sets", "pairs"):
            raise ConfigError(f"keys: got {self.keys!r}, expected 'auto', 'sets' or 'pairs'")
        check_positive(
            back_off=self.back_off,
            max_keys=self.max_keys,
        )


class PathTable(BasePredictor[PathTableSettings]):
    """`P(e | experts of the layers before)`, for the token at hand.

    Layers 0 and 1 read the last layers of the token before. Further than a layer ahead, the
    table's own answer takes the place of the layer that has not routed: probabilities vote.
    """

    name = "path-table"
    settings_type = PathTableSettings

    _rates: Array | None = None  # [S, E]
    _pairs: Array | None = None  # [S, E, E]: P(second at l | first at l - 1)
    _one: KeyedRates | None = None  # of the layer before
    _two: KeyedRates | None = None  # of the two layers before

    def scores(self, trace: Trace, horizon: Horizon) -> Array:
        """As the base says."""
        self.check(trace)
        known_layers(horizon, trace.num_layers)
        before = _with_layers_before(previous_routes(trace), trace.experts)
        if self._rates is None or self._pairs is None:
            return np.zeros((*trace.experts.shape[:2], trace.num_experts), np.float32)
        nearest = np.stack(
            [self._next_layer(before, layer) for layer in range(trace.num_layers)], axis=1
        )
        found = nearest
        hops = trace.num_layers if horizon == "token" else min(horizon, trace.num_layers)
        for _ in range(hops - 1):
            further = [nearest[:, 0]]
            further += [
                _vote(found[:, layer - 1], self._pairs[layer], self._rates[layer])
                for layer in range(1, trace.num_layers)
            ]
            found = np.stack(further, axis=1)
        return lift_trace(found, self._rates, trace) if self.settings.adapt else found

    def state(self) -> dict[str, Array]:
        """Rates `[S, E]`, pairs `[S, E, E]`, and keys with their rates where sets are keys."""
        assert self._rates is not None and self._pairs is not None
        arrays = {"rates": self._rates, "pairs": self._pairs}
        for name, table in (("one", self._one), ("two", self._two)):
            if table is not None:
                arrays |= {f"{name}.keys": table.keys, f"{name}.rates": table.rates}
        return arrays

    def core_tables(self) -> tuple[str, dict[str, Any]] | None:
        """What the core's scorer needs to guess the next layer inside of a forward.

        Returns:
            Kind and tables; None where sets are keys, or where it follows the running sequence.
        """
        if self._pairs is None or self._by_sets() or self.settings.adapt:
            return None
        layers, experts, _ = self._pairs.shape
        return "pairs", {"num_layers": layers, "num_experts": experts, "pairs": self._pairs}

    def load_state(self, arrays: Mapping[str, Array]) -> None:
        """Takes what `state` gave."""
        assert self.shape is not None
        layers, experts, top_k = self.shape.num_layers, self.shape.num_experts, self.shape.top_k
        self._rates = check_rates("rates", take(arrays, "rates", (layers, experts)))
        self._pairs = check_rates("pairs", take(arrays, "pairs", (layers, experts, experts)))
        self._one = self._two = None
        if self._by_sets():
            self._one = KeyedRates.of_state(arrays, "one", 1 + top_k, experts)
            self._two = KeyedRates.of_state(arrays, "two", 1 + 2 * top_k, experts)

    def _fit(
        self, trace: Trace, choose: Trace | None, seed: int, progress: Progress
    ) -> Mapping[str, Any] | None:
        back = np.float32(self.settings.back_off)
        rates = self._rates = expert_rates(trace)
        before = _with_layers_before(previous_routes(trace), trace.experts)
        layers, experts = rates.shape
        pairs = np.empty((layers, experts, experts), np.float32)
        one: list[KeyedRates] = []
        two: list[KeyedRates] = []
        for layer in range(layers):
            used = multi_hot(trace.experts[:, layer], experts)
            voters = multi_hot(before[:, layer + 1], experts)
            times = voters.sum(0)[:, None]
            pairs[layer] = (voters.T @ used + back * rates[layer]) / (times + back)
            if self._by_sets():
                last, both = _keys(before, layer)
                one.append(KeyedRates.counted(last, used, rates[layer], back))
                behind = one[-1].look_up(last, rates[layer])
                two.append(KeyedRates.counted(both, used, behind, back))
            progress(layer + 1, layers)
        self._pairs = pairs
        self._one = KeyedRates.joined(one, self.settings.max_keys) if one else None
        self._two = KeyedRates.joined(two, self.settings.max_keys) if two else None
        if self._one is None or self._two is None:
            return {"keys": "pairs"}
        return {"keys": "sets", "one_layer": len(self._one.keys), "two_layers": len(self._two.keys)}

    def _begin(self, request: Request) -> None:
        if self.settings.adapt:
            assert self.shape is not None
            layers, experts = self.shape.num_layers, self.shape.num_experts
            request.memory = DecayedCounts(layers, experts, LIFT_HALF_LIFE)

    def _predict(self, request: Request, first: int, stop: int) -> Array:
        assert self.shape is not None
        found = np.zeros((stop, self.shape.num_experts), np.float32)
        if self._rates is None or self._pairs is None:
            return found[first:]
        before = _with_layers_before(request.previous[None], request.routes[None])
        here = request.layer
        found[here] = self._next_layer(before, here)[0]
        for layer in range(here + 1, stop):
            found[layer] = _vote(found[layer - 1][None], self._pairs[layer], self._rates[layer])[0]
        if self.settings.adapt:
            span = slice(first, stop)
            return request.memory.lift(found[span], self._rates[span], span)
        return found[first:]

    def _finish(self, request: Request) -> None:
        if self.settings.adapt:
            request.memory.add(request.routes)

    def _by_sets(self) -> bool:
        assert self.shape is not None
        few = self.shape.num_experts < _PAIRS_FROM
        return self.settings.keys == "sets" or (self.settings.keys == "auto" and few)

    def _next_layer(self, before: Array, layer: int) -> Array:
        """From true routes of the layers before, `[N, S + 2, K]`: float32 `[N, E]`."""
        assert self._rates is not None and self._pairs is not None
        rates = self._rates[layer]
        if self._one is not None and self._two is not None:
            last, both = _keys(before, layer)
            return self._two.look_up(both, self._one.look_up(last, rates))
        return _vote(multi_hot(before[:, layer + 1], len(rates)), self._pairs[layer], rates)


def _with_layers_before(previous: Array, routes: Array) -> Array:
    """Each token's routes behind the last two layers of the token before: `[N, S + 2, K]`."""
    last = previous[:, -2:]
    if last.shape[1] < 2:  # a model of one layer has no second-last
        last = np.concatenate([np.full_like(last, -1), last], axis=1)
    return np.concatenate([last, routes], axis=1)


def _keys(before: Array, layer: int) -> tuple[Array, Array]:
    """Keys of one and of two layers for `layer`: int16 `[N, 1 + K]`, `[N, 1 + 2 K]`."""
    number = np.full((len(before), 1), layer, np.int16)
    older, last = np.sort(before[:, layer], axis=-1), np.sort(before[:, layer + 1], axis=-1)
    return np.hstack([number, last]), np.hstack([number, older, last])


def _vote(voters: Array, pairs: Array, rates: Array) -> Array:
    """Mean of `pairs[a]` over voters `[N, E]` by their weight; `rates` where nobody votes."""
    weight = voters.sum(-1, keepdims=True)
    return np.where(weight > 0, voters @ pairs / np.maximum(weight, 1e-9), rates).clip(0, 1)
