"""Policies times slots over one stream of routes, beside LRU and Belady."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sluice.errors import ConfigError
from sluice.simulate.replay import ReplayResult, gap_closed, replay
from sluice.simulate.routes import Routes
from sluice.text import table

Array = NDArray[Any]
BASE, BOUND = "lru", "belady"


@dataclass(frozen=True, slots=True)
class Contender:
    """A row of a grid.

    Args:
        name: What it is called.
        policy: As `replay` takes it.
        preloaded: The experts that are there from the start, of the slots of a layer; None: none.
        scores: float32 `[M, E]`, or one such array for each number of slots; None: none.
    """

    name: str
    policy: str | Callable[[int, int, int], Any]
    preloaded: Callable[[int], Sequence[tuple[int, int]]] | None = None
    scores: Array | Mapping[int, Array] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Grid:
    """What each contender did with each number of slots.

    Args:
        slots: Per layer, or of the pool.
        rows: Contender to results, one for each of `slots`.
        settings: What else the results depend on.
    """

    slots: tuple[int, ...]
    rows: Mapping[str, tuple[ReplayResult, ...]]
    settings: Mapping[str, Any]

    def gap_closed(self, name: str) -> list[float]:
        """Of the way from LRU's misses to Belady's, how much a contender goes; per `slots`."""
        rows = (self.rows[BASE], self.rows[name], self.rows[BOUND])
        return [
            gap_closed(base.miss_ratio, each.miss_ratio, bound.miss_ratio)
            for base, each, bound in zip(*rows, strict=True)
        ]

    def to_dict(self) -> dict[str, Any]:
        """All of it as JSON can hold it."""

        def entry(name: str, result: ReplayResult, closed: float) -> dict[str, Any]:
            return {
                "hit_ratio": result.hit_ratio,
                "gap_closed": closed,
                "events": result.events,
                "waves": result.waves,
                "evictions": result.evictions,
                "layers": {
                    column: getattr(result, column).tolist()
                    for column in ("requests", "hits", "first_uses", "returns")
                },
            }

        return {
            "settings": dict(self.settings),
            "slots": list(self.slots),
            "contenders": {
                name: [
                    entry(name, result, closed)
                    for result, closed in zip(results, self.gap_closed(name), strict=True)
                ]
                for name, results in self.rows.items()
            },
        }


def run_grid(
    routes: Routes,
    contenders: Sequence[Contender],
    slots: Sequence[int],
    *,
    scope: str = "layer",
    bypass: bool = True,
    unscored: float = 0.1,
) -> Grid:
    """Replays routes under every contender; LRU and Belady are always among them.

    Args:
        routes: Of `routes_of`.
        contenders: Rows; names are their own.
        slots: Per layer, or of the pool.
        scope: As `replay`.
        bypass: As `replay`; Belady may always bypass.
        unscored: As `replay`.

    Raises:
        ConfigError: Two contenders of one name, or what `replay` refuses.
    """
    names = [each.name for each in contenders]
    if len(set(names)) != len(names):
        raise ConfigError(f"simulate: got contenders {', '.join(names)}, expected each name once")
    first, last = ([] if name in names else [Contender(name, name)] for name in (BASE, BOUND))
    rows: dict[str, tuple[ReplayResult, ...]] = {}
    for each in [*first, *contenders, *last]:
        results: list[ReplayResult] = []
        for count in slots:
            scores = each.scores
            results.append(
                replay(
                    routes,
                    each.policy,
                    count,
                    scope=scope,
                    bypass=bypass or each.name == BOUND,
                    unscored=unscored,
                    preloaded=each.preloaded(count) if each.preloaded else (),
                    scores=scores[count] if isinstance(scores, Mapping) else scores,
                )
            )
        rows[each.name] = tuple(results)
    settings = {
        "scope": scope,
        "bypass": bypass,
        "unscored": unscored,
        "tokens": routes.num_tokens,
        "events": routes.num_events,
        "layers": routes.num_layers,
        "experts": routes.num_experts,
    }
    return Grid(slots=tuple(slots), rows=rows, settings=settings)


def grid_text(grid: Grid) -> str:
    """Hits in % and, behind them, the share of the gap from LRU to Belady that is closed."""
    head = ["", *(f"{count} slots" for count in grid.slots), "gap closed", "mean"]
    rows: list[list[str]] = []
    for name, results in grid.rows.items():
        closed = grid.gap_closed(name)
        rows.append(
            [
                name,
                *(f"{100 * result.hit_ratio:.1f}" for result in results),
                " / ".join(_percent(each) for each in closed),
                _percent(float(np.mean(closed))),
            ]
        )
    return table(head, rows)


def _percent(share: float) -> str:
    return "-" if np.isnan(share) else f"{100 * share:.0f}"
