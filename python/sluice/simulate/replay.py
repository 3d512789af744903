"""Replacement alone: routes through the product's caches, event by event, without a clock."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sluice import _core
from sluice.errors import ConfigError
from sluice.simulate.routes import Routes
from sluice.trace import Trace

Array = NDArray[Any]
ONLY_SIMULATED = ("belady", "mrs")


def policy_names() -> list[str]:
    """Every policy that has a name here: the sessions' own and those that only simulations have."""
    return sorted([*_core.policy_names(), *ONLY_SIMULATED])


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplayResult:
    """What a replay counted, per layer (int64 `[S]`) and in all.

    Args:
        requests: Distinct experts of all events.
        hits: Of these, resident when their event began.
        first_uses: Misses of experts that had never been there.
        returns: Misses of experts that had been evicted.
        event_hits: int32 `[M]`, hits of each event, counted or not.
        events: Events that were counted.
        waves: Rounds through the slots; more than `events` where one event needs more than there
            are.
        evictions: Experts that left, also those that were only served.
    """

    requests: Array
    hits: Array
    first_uses: Array
    returns: Array
    event_hits: Array
    events: int
    waves: int
    evictions: int

    @property
    def hit_ratio(self) -> float:
        """Hits per request; 0 without a request."""
        requests = int(self.requests.sum())
        return int(self.hits.sum()) / requests if requests else 0.0

    @property
    def miss_ratio(self) -> float:
        """Misses per request, what is to be read; 0 without a request."""
        requests = int(self.requests.sum())
        return int((self.first_uses + self.returns).sum()) / requests if requests else 0.0


def replay(
    routes: Routes,
    policy: str | Callable[[int, int, int], Any],
    slots: int | Sequence[int],
    *,
    scope: str = "layer",
    bypass: bool = True,
    unscored: float = 0.1,
    preloaded: Iterable[tuple[int, int]] = (),
    scores: Array | None = None,
) -> ReplayResult:
    """Replays routes event by event, as papers compare policies (2608.07911).

    Hits are judged against the cache as an event finds it, all misses are served, and only then the
    policy decides who stays.

    Args:
        routes: Of `routes_of`.
        policy: A name of `policy_names()`, or a class of one's own, made of (num_layers,
            num_experts, num_slots) for each cache. It needs `victim(candidates) -> index`, where
            candidates are (layer, expert) pairs, and may have `on_event(step, layer, experts)`,
            `on_load(layer, expert)`, `on_evict(layer, expert)` and `on_forecast(step, layer,
            scores)`.
        slots: Per layer, one number or one for each; of the whole pool where `scope` is "pool".
        scope: "layer": each has slots of its own; "pool": all share them.
        bypass: An expert may be served without being kept. False: an event's experts stay until
            the next event.
        unscored: The share of events, the first, that only warm the caches.
        preloaded: (layer, expert) that are there from the start.
        scores: float32 `[M, E]`: each event's keep-scores of its own layer, for "forecast" (as the
            product judges them) and "forecast:always". `gather_scores` makes them of a trace's.

    Raises:
        ConfigError: What does not fit, by name.
        Exception: Whatever a policy of one's own raised.
    """
    if scope not in ("layer", "pool"):
        raise ConfigError(f'scope: got {scope!r}, expected "layer" or "pool"')
    if not 0 <= unscored < 1:
        raise ConfigError(f"unscored: got {unscored}, expected a share of at least 0 and below 1")
    if isinstance(policy, str) and policy not in ONLY_SIMULATED:
        _core.check_policy(policy)
    if isinstance(slots, Sequence):
        each = [int(n) for n in slots]
    else:
        each = [int(slots)] * (routes.num_layers if scope == "layer" else 1)
    counted = _core.replay(
        routes.core(),
        each,
        policy,
        bypass,
        int(unscored * routes.num_events),
        list(preloaded),
        None if scores is None else np.ascontiguousarray(scores, dtype=np.float32),
    )
    columns = ("requests", "hits", "first_uses", "returns")
    return ReplayResult(
        **{name: np.array(counted[name], dtype=np.int64) for name in columns},
        event_hits=counted["event_hits"],
        events=counted["events"],
        waves=counted["waves"],
        evictions=counted["evictions"],
    )


def gather_scores(routes: Routes, scores: Array) -> Array:
    """Keep-scores of a trace, `[N, S, E]`, as its events want them, `[M, E]`.

    Raises:
        ConfigError: The routes are of a batch, whose events are of several rows.
    """
    if routes.rows is None:
        raise ConfigError("scores: got routes of a batch, expected a batch of 1: a row an event")
    return np.ascontiguousarray(scores[routes.rows, routes.layers], dtype=np.float32)


def popular_experts(trace: Trace, slots: int) -> list[tuple[int, int]]:
    """The experts that a trace uses most, `slots` of each layer: what a static cache holds."""
    chosen: list[tuple[int, int]] = []
    for layer in range(trace.num_layers):
        used = trace.experts[:, layer]
        counts = np.bincount(used[used >= 0], minlength=trace.num_experts)
        chosen += [(layer, int(e)) for e in np.argsort(-counts, kind="stable")[:slots]]
    return chosen


def gap_closed(lru: float, policy: float, belady: float) -> float:
    """How much of the way from LRU's misses to Belady's a policy goes; nan where there is none."""
    return (lru - policy) / (lru - belady) if lru > belady else float("nan")
