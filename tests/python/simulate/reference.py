"""Each policy once more, in plain Python, and the event-atomic replay that they are compared in."""

from __future__ import annotations

import math
from collections.abc import Sequence

Key = tuple[int, int]
Event = tuple[int, int, list[int]]  # step, layer, experts in the order in which they count as used


class Reference:
    """Keeps the largest `keep(key)`; of equals the highest key leaves."""

    def __init__(self, num_layers: int, num_experts: int, num_slots: int) -> None:
        self.num_layers, self.num_experts, self.num_slots = num_layers, num_experts, num_slots
        self.step = -1
        self.layer = -1

    def on_event(self, step: int, layer: int, experts: Sequence[int]) -> None:
        self.step, self.layer = step, layer
        self.used(layer, experts)

    def used(self, layer: int, experts: Sequence[int]) -> None: ...
    def on_load(self, key: Key) -> None: ...
    def on_evict(self, key: Key) -> None: ...
    def on_forecast(self, step: int, layer: int, scores: Sequence[float]) -> None: ...

    def keep(self, key: Key) -> object:
        raise NotImplementedError

    def victim(self, residents: Sequence[Key]) -> Key:
        return min(residents, key=lambda key: (self.keep(key), -key[0], -key[1]))


class Lru(Reference):
    def __init__(self, *shape: int) -> None:
        super().__init__(*shape)
        self.clock = 0
        self.last: dict[Key, int] = {}

    def used(self, layer: int, experts: Sequence[int]) -> None:
        for expert in experts:
            self.clock += 1
            self.last[layer, expert] = self.clock

    def keep(self, key: Key) -> object:
        return self.last[key]


class Fifo(Reference):
    def __init__(self, *shape: int) -> None:
        super().__init__(*shape)
        self.clock = 0
        self.came: dict[Key, int] = {}

    def on_load(self, key: Key) -> None:
        self.clock += 1
        self.came[key] = self.clock

    def keep(self, key: Key) -> object:
        return self.came[key]


class Static(Fifo):
    def keep(self, key: Key) -> object:
        return -self.came[key]


class Lfu(Reference):
    def __init__(self, *shape: int) -> None:
        super().__init__(*shape)
        self.count: dict[Key, int] = {}
        self.last: dict[Key, int] = {}

    def used(self, layer: int, experts: Sequence[int]) -> None:
        for expert in experts:
            key = (layer, expert)
            self.count[key] = self.count.get(key, 0) + 1
            self.last[key] = self.step

    def keep(self, key: Key) -> object:
        return self.count[key]


class Lfru(Lfu):
    def keep(self, key: Key) -> object:
        return self.count[key] / (self.step - self.last[key] + 1)


class Edge(Lfu):
    def keep(self, key: Key) -> object:
        return self.count[key] / ((key[0] - self.layer - 1) % self.num_layers + 1)


class EdgePrinted(Lfu):
    def keep(self, key: Key) -> object:
        return self.count[key] / ((self.layer - key[0] - 1) % self.num_layers + 1)


class DecayedLfu(Reference):
    """Counts that are multiplied, step by step: another way to the same numbers."""

    half_life = 16.0

    def __init__(self, *shape: int) -> None:
        super().__init__(*shape)
        self.count: dict[Key, tuple[float, int]] = {}

    def value(self, key: Key) -> float:
        count, at = self.count.get(key, (0.0, 0))
        return count * 2.0 ** ((at - self.step) / self.half_life)

    def used(self, layer: int, experts: Sequence[int]) -> None:
        for expert in experts:
            self.count[layer, expert] = (self.value((layer, expert)) + 1.0, self.step)

    def keep(self, key: Key) -> object:
        return round(math.log2(self.value(key) or 1e-300), 9)  # equal histories are equal


class LeastStale(Lru):
    def __init__(self, *shape: int) -> None:
        super().__init__(*shape)
        self.touched: dict[Key, int] = {}

    def used(self, layer: int, experts: Sequence[int]) -> None:
        super().used(layer, experts)
        self.touched |= {(layer, expert): self.step for expert in experts}

    def keep(self, key: Key) -> object:
        fresh = self.touched[key] == self.step
        until = (key[0] - self.layer - 1) % self.num_layers
        return (fresh, -until if fresh else 0, self.last[key])


class S3Fifo(Reference):
    def __init__(self, *shape: int) -> None:
        super().__init__(*shape)
        self.small: list[Key] = []
        self.main: list[Key] = []
        self.ghosts: list[Key] = []
        self.uses: dict[Key, int] = {}

    def used(self, layer: int, experts: Sequence[int]) -> None:
        for expert in experts:
            if (layer, expert) in self.uses:
                self.uses[layer, expert] = min(3, self.uses[layer, expert] + 1)

    def on_load(self, key: Key) -> None:
        self.uses[key] = 0
        if key in self.ghosts:
            self.ghosts.remove(key)
            self.main.append(key)
        else:
            self.small.append(key)

    def on_evict(self, key: Key) -> None:
        del self.uses[key]
        if key in self.small:
            self.small.remove(key)
            self.ghosts = [*self.ghosts, key][-self.num_slots :]
        else:
            self.main.remove(key)

    def victim(self, residents: Sequence[Key]) -> Key:
        while True:
            small, main = ([k for k in q if k in residents] for q in (self.small, self.main))
            if small and (len(self.small) >= max(1, self.num_slots // 10) or not main):
                head = small[0]
                if self.uses[head] <= 1:
                    return head
                self.small.remove(head)
                self.uses[head] = 0
            else:
                head = main[0]
                if self.uses[head] == 0:
                    return head
                self.main.remove(head)
                self.uses[head] -= 1
            self.main.append(head)


class Plec(Fifo):
    def __init__(self, *shape: int) -> None:
        super().__init__(*shape)
        self.expected: set[Key] = set()

    def on_forecast(self, step: int, layer: int, scores: Sequence[float]) -> None:
        for expert, score in enumerate(scores):
            (self.expected.add if score > 0 else self.expected.discard)((layer, expert))

    def used(self, layer: int, experts: Sequence[int]) -> None:
        self.expected = {key for key in self.expected if key[0] != layer}

    def keep(self, key: Key) -> object:
        distance = (key[0] - self.layer - 1) % self.num_layers + 1
        return (-distance if key in self.expected else -math.inf, self.came[key])


class Mrs(Reference):
    def __init__(self, *shape: int) -> None:
        super().__init__(*shape)
        self.score: dict[Key, float] = {}

    def used(self, layer: int, experts: Sequence[int]) -> None:
        for expert in range(self.num_experts):
            key = (layer, expert)
            self.score[key] = 0.75 * self.score.get(key, 0.0) + 0.25 * (expert in experts)

    def keep(self, key: Key) -> object:
        return self.score.get(key, 0.0)


class Forecast(DecayedLfu):
    """Keep-scores while a shadow cache says that they are worth it, else decayed frequency."""

    def __init__(self, *shape: int) -> None:
        super().__init__(*shape)
        self.score: dict[Key, float] = {}
        self.made_at: dict[int, int] = {}
        self.shadows: list[dict[int, list[int]]] = [{}, {}]
        self.pending: tuple[int, list[int]] | None = None
        self.events = 0
        self.excess = self.base = 0.0
        self.rules = False

    def on_forecast(self, step: int, layer: int, scores: Sequence[float]) -> None:
        self.score |= {(layer, expert): score for expert, score in enumerate(scores)}
        self.made_at[layer] = step

    def fresh(self, layer: int) -> bool:
        return self.step - self.made_at.get(layer, -1000) <= 16

    def on_event(self, step: int, layer: int, experts: Sequence[int]) -> None:
        if self.pending is not None:
            self.settle(*self.pending)
        super().on_event(step, layer, experts)
        self.pending = (layer, list(experts))

    def settle(self, layer: int, experts: list[int]) -> None:
        misses: list[int] = []
        for which, shadow in enumerate(self.shadows):
            held = shadow.setdefault(layer, [])
            new = [expert for expert in experts if expert not in held]
            misses.append(len(new))
            held += new
            use_score = which == 0 and self.fresh(layer)

            def keep(place: int, held: list[int] = held, use_score: bool = use_score) -> object:
                key = (layer, held[place])
                kept = self.score[key] if use_score else DecayedLfu.keep(self, key)
                return (kept, -place)

            while len(held) > max(1, self.num_slots // self.layers_served):
                held.pop(min(range(len(held)), key=keep))
        decay = 2.0 ** (-1 / 512)
        self.excess = self.excess * decay + misses[0] - misses[1]
        self.base = self.base * decay + misses[1]
        self.excess = max(self.excess, -0.02 * self.base)
        self.events += 1
        if self.events > 256:
            if self.excess <= 0:
                self.rules = True
            if self.excess > 0.02 * self.base:
                self.rules = False

    def victim(self, residents: Sequence[Key]) -> Key:
        use_score = self.rules and all(self.fresh(layer) for layer, _ in residents)
        self.keep = (lambda key: self.score[key]) if use_score else super().keep  # type: ignore[method-assign]
        return super().victim(residents)


class ForecastAlways(Forecast):
    def __init__(self, *shape: int) -> None:
        super().__init__(*shape)
        self.rules = True

    def settle(self, layer: int, experts: list[int]) -> None: ...


POLICIES: dict[str, type[Reference]] = {
    "decayed-lfu": DecayedLfu,
    "edge": Edge,
    "edge:printed": EdgePrinted,
    "fifo": Fifo,
    "forecast": Forecast,
    "forecast:always": ForecastAlways,
    "least-stale": LeastStale,
    "lfru": Lfru,
    "lfu": Lfu,
    "lru": Lru,
    "mrs": Mrs,
    "plec": Plec,
    "s3-fifo": S3Fifo,
    "static": Static,
}


def replay(
    events: Sequence[Event],
    make: type[Reference],
    *,
    num_layers: int,
    num_experts: int,
    slots: Sequence[int],
    bypass: bool,
    scores: Sequence[Sequence[float]] | None,
) -> list[tuple[int, int, int]]:
    """Per event: hits, and misses of newcomers and of who was here before."""
    policies = [make(num_layers, num_experts, n) for n in slots]
    for policy in policies:
        policy.layers_served = num_layers if len(slots) == 1 else 1
    resident: list[set[Key]] = [set() for _ in slots]
    known: set[Key] = set()
    counted: list[tuple[int, int, int]] = []
    for i, (step, layer, experts) in enumerate(events):
        pool = layer if len(slots) > 1 else 0
        policy, held = policies[pool], resident[pool]
        policy.on_event(step, layer, experts)
        if scores is not None:
            policy.on_forecast(step, layer, scores[i])
        needed = {(layer, expert) for expert in experts}
        missing = [(layer, expert) for expert in experts if (layer, expert) not in held]
        new = sum(key not in known for key in missing)
        counted.append((len(experts) - len(missing), new, len(missing) - new))
        for key in missing:
            policy.on_load(key)
        held |= needed
        known |= needed
        stays = needed if not bypass and len(needed) <= slots[pool] else set()
        while len(held) > slots[pool]:
            victim = policy.victim(sorted(held - stays))
            held.remove(victim)
            policy.on_evict(victim)
    return counted
