"""fMoE's predictor: the stored token most like this one, by what came before and by its path.

Source: 2502.05370 (F1 to F4). Layers whose distance reaches before layer 0 are found by a key, the
others by the token's own layers so far. Readings of this project: without states the key is the map
of the token before; what a map says is blended with the rates of all tokens by how like it is; maps
are of single tokens, and with `adapt` a sequence's enter the store when it has left.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sluice.errors import CheckpointError, ConfigError
from sluice.predict.arrays import multi_hot, take
from sluice.predict.base import BasePredictor, Progress
from sluice.predict.live import Request
from sluice.predict.offline import Horizon, known_layers
from sluice.predict.protocol import Guess, union_probability
from sluice.predict.training_free.counting import check_rates, expert_rates
from sluice.predict.training_free.map_store import MapStore, prefix_lengths, unit
from sluice.trace import Trace, TraceSequence

Array = NDArray[Any]

_ROWS_AT_ONCE = 256


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertMapSettings:
    """What is stored and how it is found.

    Args:
        capacity: Maps that are kept; each takes 8 S E bytes.
        key: "previous": the map of the token before; "states": the mean of what entered the first
            layer's experts over the sequence's tokens so far, for traces with hidden states.
        distance: d: how many layers are prefetched ahead; weighs keys against paths when a full
            store has to give up a map.
        adapt: Sequences that have left are stored, too.
    """

    capacity: int = 1000
    key: str = "previous"
    distance: int = 3
    adapt: bool = False

    def __post_init__(self) -> None:
        if self.capacity < 1:
            raise ConfigError(f"capacity: got {self.capacity}, expected at least 1 map")
        if self.key not in ("previous", "states"):
            raise ConfigError(f"key: got {self.key!r}, expected 'previous' or 'states'")
        if self.distance < 0:
            raise ConfigError(f"distance: got {self.distance}, expected 0 or more layers")


class _Memory:
    """What is known of one request: its key, its running path, what it will add to the store."""

    __slots__ = ("dots", "entered", "keys", "layers", "maps", "path", "previous", "store")

    def __init__(self, store: MapStore) -> None:
        self.store = store
        self.entered: Array | float = 0.0  # sum over tokens
        self.previous: Array | None = None  # map of the token before
        self.maps: list[Array] = []
        self.keys: list[Array] = []
        self.begin_token()

    def begin_token(self) -> None:
        self.layers = 0
        self.dots = np.zeros((1, len(self.store)), np.float32)
        self.path: list[Array] = []


class ExpertMap(BasePredictor[ExpertMapSettings]):
    """Nearest stored map; `plan` takes experts until F3's threshold, poor matches taking more."""

    name = "expert-map"
    settings_type = ExpertMapSettings

    def __init__(self, settings: ExpertMapSettings | None = None) -> None:
        super().__init__(settings)
        self.needs_hidden = self.settings.key == "states"
        self.sequences_apart = not self.settings.adapt
        self._rates: Array | None = None
        self._fitted: MapStore | None = None
        self._store: MapStore | None = None  # with what was added since; `reset` takes it back
        self._visits: Array = np.zeros((0, 0), np.float32)  # [S, E], since `reset`

    def scores(self, trace: Trace, horizon: Horizon) -> Array:
        """As the base says."""
        self.check(trace)
        known = known_layers(horizon, trace.num_layers)
        return self._scores_of(trace, known, later=0)

    def keep_scores(self, trace: Trace) -> Array | None:
        """Probability times visits so far: who has the least of it leaves first (F3)."""
        self.check(trace)
        if self._fitted is None:
            return None
        # Of each layer once it has run; of the last one by the key of the token that follows.
        known = np.append(np.arange(1, trace.num_layers), 0)
        found = self._scores_of(trace, known, later=1)
        used = multi_hot(trace.experts, trace.num_experts)
        visits = np.cumsum(used, axis=0)
        visits[:, :-1] -= used[:, :-1]  # the running token counts when all its layers have run
        return found * visits

    def forecast(self) -> Array | None:
        """The same of the running tokens, of every layer by what is known now."""
        if self.shape is None or self._store is None:
            return None
        layers = self.shape.num_layers
        rows = [self._predict(request, 0, layers) for request in self._requests().running]
        if not rows:
            return None
        return union_probability(np.stack(rows)) * self._visits

    def reset(self) -> None:
        """Forgets all live requests, the maps that they added and their visits."""
        super().reset()
        self._store = self._fitted
        if self.shape is not None:
            self._visits = np.zeros((self.shape.num_layers, self.shape.num_experts), np.float32)

    def plan(self, horizon: int) -> list[Guess]:
        """F3: by probability until their sum reaches 1 - likeness and they are k; nearest first."""
        if self.shape is None or self._store is None or horizon < 1:
            return []
        live, layers = self._requests(), self.shape.num_layers
        first = live.layer
        probabilities = self.upcoming(horizon)
        guesses: list[tuple[float, Guess]] = []
        for visit in range(horizon):
            ahead, layer = divmod(first + visit, layers)
            wanted = np.zeros(self.shape.num_experts, np.bool_)
            for request in live.running:
                if ahead > 0 or request.decoding:
                    held = request if ahead == 0 else request.idle()
                    found, likeness = self._found(held, layer)
                    wanted |= chosen(found, likeness, self.shape.top_k)
            for expert in np.flatnonzero(wanted & (probabilities[visit] > 0)).tolist():
                probability = float(probabilities[visit, expert])
                guess = Guess(layer, expert, probability, ahead)
                guesses.append((probability / (visit + 1), guess))
        guesses.sort(key=lambda pair: (-pair[0], pair[1].steps_ahead, pair[1].layer))
        return [guess for _, guess in guesses]

    def state(self) -> dict[str, Array]:
        """`rates` `[S, E]`, `maps` `[n, S, E]`, `keys` `[n, Q]`."""
        assert self._rates is not None and self._fitted is not None
        return {"rates": self._rates, "maps": self._fitted.maps, "keys": self._fitted.keys}

    def load_state(self, arrays: Mapping[str, Array]) -> None:
        """Takes what `state` gave."""
        assert self.shape is not None
        layers, experts = self.shape.num_layers, self.shape.num_experts
        maps = check_rates("maps", take(arrays, "maps", (-1, layers, experts)))
        width = -1 if self.settings.key == "states" else layers * experts
        keys = take(arrays, "keys", (len(maps), width))
        if not 1 <= len(maps) <= self.settings.capacity:
            raise CheckpointError(
                f"expert-map: got {len(maps)} maps, expected 1 to {self.settings.capacity}"
            )
        self._rates = check_rates("rates", take(arrays, "rates", (layers, experts)))
        self._fitted = self._store_of(maps, keys)
        self.reset()

    def _fit(
        self, trace: Trace, choose: Trace | None, seed: int, progress: Progress
    ) -> Mapping[str, Any] | None:
        self._rates = expert_rates(trace)
        self._fitted = None
        for done, sequence in enumerate(trace.sequences):
            maps, keys = _maps_of(trace, sequence), self._keys_of(trace, sequence)[:-1]
            if self._fitted is None:
                self._fitted = self._store_of(maps[:0], keys[:0])
            self._fitted.insert(maps, keys)
            progress(done + 1, len(trace.sequences))
        self.reset()
        return {"maps": 0 if self._fitted is None else len(self._fitted)}

    def _store_of(self, maps: Array, keys: Array) -> MapStore:
        share = min(self.settings.distance / maps.shape[1], 1.0)
        return MapStore(self.settings.capacity, share, maps, keys)

    def _add(self, maps: Array, keys: Array) -> None:
        if self._store is not None:
            most = self.settings.capacity
            self._store = self._store.copy()  # requests that run search the one they began with
            self._store.insert(maps[-most:], keys[-most:])

    def _keys_of(self, trace: Trace, sequence: TraceSequence) -> Array:
        """Keys of T tokens and of one more, each from those before it: float32 `[T + 1, Q]`."""
        if self.settings.key == "states":
            assert trace.hidden is not None
            entered = trace.hidden[sequence.rows, 0].astype(np.float32)
            before = np.cumsum(entered, axis=0, dtype=np.float32)
        else:
            before = _maps_of(trace, sequence).reshape(sequence.length, -1)
        return unit(np.concatenate([np.zeros_like(before[:1]), before]))

    def _scores_of(self, trace: Trace, known: Array, *, later: int) -> Array:
        """`_search` for all tokens, or with `later=1` for the keys of those that follow them."""
        found = np.zeros((*trace.experts.shape[:2], trace.num_experts), np.float32)
        self.reset()
        if self._store is None:
            return found
        for sequence in trace.sequences:
            maps, keys = _maps_of(trace, sequence), self._keys_of(trace, sequence)
            for start in range(0, sequence.length, _ROWS_AT_ONCE):
                stop = min(start + _ROWS_AT_ONCE, sequence.length)
                at = slice(sequence.start + start, sequence.start + stop)
                found[at] = self._search(
                    maps[start:stop], keys[start + later : stop + later], known
                )
            if self.settings.adapt:
                self._add(maps, keys[:-1])
        self.reset()
        return found

    def _search(self, maps: Array, keys: Array, known: Array) -> Array:
        """Probabilities `[N, S, E]`, layer s from `known[s]` layers of `maps`."""
        assert self._store is not None and self._rates is not None
        by_key, likeness = self._store.nearest_key(keys)
        lengths = prefix_lengths(maps)
        dots = np.zeros((len(maps), len(self._store)), np.float32)
        found = np.empty_like(maps)
        done = 0
        for layer, layers in enumerate(known.tolist()):
            best, how = by_key, likeness
            if layers:
                for new in range(done, layers):
                    dots += self._store.dots(maps[:, new], new)
                done = layers
                best, how = self._store.nearest_path(dots, lengths[:, layers], layers)
            found[:, layer] = self._blend(self._store.maps[best, layer], how, layer)
        return found

    def _blend(self, maps: Array, likeness: Array, layer: int) -> Array:
        """What maps `[N, E]` say of `layer`, as far as they are alike; else all tokens' rates."""
        assert self.shape is not None and self._rates is not None
        usage = np.minimum(self.shape.top_k * maps, 1)
        return likeness[:, None] * usage + (1 - likeness[:, None]) * self._rates[layer]

    def _begin(self, request: Request) -> None:
        if self._store is not None:
            request.memory = _Memory(self._store)

    def _predict(self, request: Request, first: int, stop: int) -> Array:
        assert self.shape is not None
        if request.memory is None:
            return np.zeros((stop - first, self.shape.num_experts), np.float32)
        rows: list[Array] = []
        for layer in range(first, stop):
            found, likeness = self._found(request, layer)
            rows.append(self._blend(found[None], np.array([likeness], np.float32), layer)[0])
        return np.stack(rows)

    def _found(self, request: Request, layer: int) -> tuple[Array, float]:
        """The stored map's row for a layer, and how like the map is."""
        memory: _Memory = request.memory
        if request.layer == 0:
            best, how = memory.store.nearest_key(self._key_of(memory))
        else:
            for new in range(memory.layers, request.layer):
                row = self._map_of(request, slice(new, new + 1))
                memory.path.append(row)
                memory.dots += memory.store.dots(row, new)
            memory.layers = request.layer
            lengths = prefix_lengths(np.stack(memory.path, axis=1))[:, request.layer]
            best, how = memory.store.nearest_path(memory.dots, lengths, request.layer)
        return memory.store.maps[best[0], layer], float(how[0])

    def _map_of(self, request: Request, layers: slice) -> Array:
        assert self.shape is not None
        routes, weights = request.routes[layers], request.weights[layers]
        return _scattered(routes, weights, self.shape.num_experts)

    def _key_of(self, memory: _Memory) -> Array:
        width = memory.store.keys.shape[1]
        if self.settings.key == "states":
            return unit(np.broadcast_to(np.asarray(memory.entered, np.float32), (1, width)))
        if memory.previous is None:
            return np.zeros((1, width), np.float32)
        return unit(memory.previous.reshape(1, -1))

    def _finish(self, request: Request) -> None:
        memory: _Memory | None = request.memory
        if memory is None:
            return
        whole = self._map_of(request, slice(None))
        assert self.shape is not None
        self._visits += multi_hot(request.routes, self.shape.num_experts)
        if self.settings.adapt:
            memory.keys.append(self._key_of(memory)[0])
            memory.maps.append(whole)
            del memory.keys[: -self.settings.capacity], memory.maps[: -self.settings.capacity]
        memory.previous = whole
        if request.entered is not None:
            memory.entered = memory.entered + request.entered
        memory.begin_token()

    def _give_up(self, request: Request) -> None:
        if request.memory is not None:
            request.memory.begin_token()

    def _leave(self, request: Request) -> None:
        memory: _Memory | None = request.memory
        if memory is not None and memory.maps:
            self._add(np.stack(memory.maps), np.stack(memory.keys))
            memory.maps, memory.keys = [], []


def chosen(probabilities: Array, likeness: float, top_k: int) -> Array:
    """F3: the likeliest experts until they sum to clip(1 - likeness, 0, 1) and are at least k.

    Args:
        probabilities: float32 `[E]`, one layer of a map.
        likeness: Of the map that was found.
        top_k: k.

    Returns:
        bool `[E]`.
    """
    order = np.argsort(-probabilities, kind="stable")
    so_far = np.cumsum(probabilities[order])
    enough = int(np.searchsorted(so_far, min(max(1 - likeness, 0.0), 1.0))) + 1
    taken = np.zeros(len(order), np.bool_)
    taken[order[: max(enough, top_k)]] = True
    return taken


def _maps_of(trace: Trace, sequence: TraceSequence) -> Array:
    """Maps of a sequence's tokens: float32 `[T, S, E]`."""
    weights = None if trace.weights is None else trace.weights[sequence.rows]
    return _scattered(trace.experts[sequence.rows], weights, trace.num_experts)


def _scattered(routes: Array, weights: Array | None, num_experts: int) -> Array:
    """Routes `[..., K]` as shares of their weights, equal ones where these are unknown."""
    there = (routes >= 0).astype(np.float32)
    held = there if weights is None else weights * there
    total = held.sum(-1, keepdims=True)
    held = np.where(total > 0, held, there)
    held = held / np.maximum(held.sum(-1, keepdims=True), 1e-9)
    maps = np.zeros((*routes.shape[:-1], num_experts + 1), np.float32)
    np.put_along_axis(maps, routes.astype(np.int64), held, axis=-1)  # -1: the column cut off below
    return maps[..., :num_experts]
