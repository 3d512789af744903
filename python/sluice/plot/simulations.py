"""Figures of simulations: policies over slots, and what foresight is worth."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sluice.plot.figures import new_axes

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from sluice.simulate.grid import Grid
    from sluice.simulate.headroom import Headroom

_CAUSAL, _FUTURE = "#0072B2", "#999999"
_LINES = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")


def policy_grid(grid: Grid, *, axes: Axes | None = None) -> Figure:
    """Hits over slots, a line for each contender; LRU and Belady frame them in grey."""
    figure, panel = new_axes(axes, width=7.5, height=4.2)
    colours = iter(_LINES * len(grid.rows))
    best_first = sorted(grid.rows, key=lambda name: -sum(r.hit_ratio for r in grid.rows[name]))
    for name in best_first:
        results = grid.rows[name]
        frame = name in ("lru", "belady")
        panel.plot(
            grid.slots,
            [100 * result.hit_ratio for result in results],
            color=_FUTURE if frame else next(colours),
            linestyle="--" if frame else "-",
            marker="o",
            markersize=4,
            label=name,
        )
    scope = "of a layer" if grid.settings["scope"] == "layer" else "of all layers"
    panel.set(
        xlabel=f"slots {scope} ({grid.settings['experts']} experts a layer)",
        ylabel="hits, % of experts asked for",
        title=f"Who stays: {grid.settings['tokens']:,} tokens, no prefetching",
    )
    panel.set_xticks(grid.slots)
    panel.grid(axis="y", color="#eeeeee")
    panel.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize=8, frameon=False)
    return figure


def headroom_figure(found: Headroom, *, axes: Axes | None = None) -> Figure:
    """Tokens/s of each arm: what does not know the future, then what knows more and more of it."""
    figure, panel = new_axes(axes, width=7.0, height=3.2)
    names = [arm.name for arm in found.arms]
    colours = [_CAUSAL if "demand" in name else _FUTURE for name in names]
    bars = panel.barh(names, [arm.tokens_per_second for arm in found.arms], color=colours)
    panel.bar_label(bars, labels=[f" {arm.tokens_per_second:,.1f}" for arm in found.arms])
    panel.invert_yaxis()
    panel.margins(x=0.15)
    share = 100 * found.slots / found.experts
    panel.set(
        xlabel="tokens/s on the virtual clock",
        title=f"Knowing the future, {share:.0f} % of experts in memory",
    )
    return figure
