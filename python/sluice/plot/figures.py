"""The figures.

Each takes a session or a recording, draws on new axes or on given ones, and returns the matplotlib
`Figure`; nothing touches pyplot or the global state of a notebook.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import TYPE_CHECKING, Any

from sluice.errors import ConfigError
from sluice.plot.recorder import Recording, experts_per_layer, residents
from sluice.timeline import Span

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from sluice.session import Session

# Okabe and Ito's palette: told apart with every common colour blindness, and in grey.
_HIT, _LATE, _MISS = "#0072B2", "#E69F00", "#D55E00"
_REASONS = {
    "demand": _MISS,
    "hint used": "#009E73",
    "hint wasted": "#CC79A7",
    "hint pending": "#999999",
}
_LANES = {
    "forward": ("layer's forward", "#999999"),
    "compute": ("expert computed", _HIT),
    "combine": ("sum of experts", "#56B4E9"),
    "stall": ("waiting for bytes", _LATE),
    "load_demand": ("read on demand", _MISS),
    "load_hint": ("read by a hint", "#009E73"),
}
_MIB = 1 << 20


def residency_map(source: Session | Recording, *, axes: Axes | None = None) -> Figure:
    """Which experts were in a slot: layers by experts.

    Of a recording, colour is the share of its tokens after which the expert was in a slot. Of a
    session, dark squares are in a slot now.
    """
    if isinstance(source, Recording):
        experts = source.experts
        held = [step.resident for step in source.steps]
        label = "share of tokens in a slot"
    else:
        experts = experts_per_layer(source)
        held = [residents(source)]
        label = "in a slot now"
    columns = max(experts, default=0)
    shares = [
        [
            sum((layer, expert) in step for step in held) / max(1, len(held))
            if expert < count
            else float("nan")
            for expert in range(columns)
        ]
        for layer, count in enumerate(experts)
    ]
    figure, panel = new_axes(axes, width=8.5, height=1.6 + 0.22 * len(experts))
    image = panel.imshow(shares, cmap="cividis", vmin=0, vmax=1, aspect="auto", origin="lower")
    panel.set(xlabel="expert", ylabel="MoE layer", title="Residency")
    panel.set_yticks(range(0, len(experts), max(1, len(experts) // 8)))
    figure.colorbar(image, ax=panel, label=label, fraction=0.05, pad=0.02)
    return figure


def hits_over_tokens(recording: Recording, *, axes: Axes | None = None) -> Figure:
    """Hits, late hits and misses of each token; prompts, which ask for many experts, are marked."""
    figure, panel = new_axes(axes, width=8.5, height=3.0)
    decoded = [(i, step) for i, step in enumerate(recording.steps) if not step.prefill]
    at = [i for i, _ in decoded]
    base = [0] * len(decoded)
    for name, colour, hatch in (
        ("hits", _HIT, ""),
        ("late", _LATE, "xx"),
        ("misses", _MISS, "//"),
    ):
        counts = [int(getattr(step, name)) for _, step in decoded]
        if any(counts) or name != "late":
            panel.bar(
                at, counts, bottom=base, width=1.0, color=colour, hatch=hatch, label=name,
                edgecolor="white", linewidth=0,
            )  # fmt: skip
        base = [low + count for low, count in zip(base, counts, strict=True)]
    prompts = [i for i, step in enumerate(recording.steps) if step.prefill]
    for i in prompts:
        panel.axvline(i, color="#333333", linewidth=0.8, linestyle=":")
    if prompts:
        panel.plot([], [], color="#333333", linewidth=0.8, linestyle=":", label="prompt read here")
    _name_runs(panel, recording)
    several = len({step.label for step in recording.steps}) > 1
    panel.set(xlabel="token", ylabel="experts asked for")
    panel.set_title("Hits and misses of each token", pad=74 if several else None)
    panel.set_xlim(-0.5, max(1, len(recording.steps)) - 0.5)
    panel.legend(loc="upper right", bbox_to_anchor=(1.0, -0.1), fontsize=8, ncols=4, frameon=False)
    return figure


def bytes_by_reason(source: Session | Recording, *, axes: Axes | None = None) -> Figure:
    """Bytes read and why: over the tokens of a recording, or a session's totals."""
    figure, panel = new_axes(axes, width=8.5, height=3.0)
    if isinstance(source, Recording):
        base = [0.0] * len(source.steps)
        for reason, colour in _REASONS.items():
            total, summed = 0.0, list[float]()
            for step in source.steps:
                total += step.bytes_read[reason] / _MIB
                summed.append(total)
            top = [low + high for low, high in zip(base, summed, strict=True)]
            # A hint's bytes change their reason when it is used: a pending sum may shrink.
            if reason == "demand" or any(summed):
                panel.fill_between(
                    range(len(top)), base, top, color=colour, step="mid", linewidth=0,
                    label=f"{reason}: {total:.1f} MiB",
                )  # fmt: skip
            base = top
        panel.set(xlabel="token", ylabel="MiB read, summed", title="Bytes read, by reason")
        panel.set_xlim(0, max(1, len(source.steps) - 1))
        panel.set_ylim(bottom=0)
        panel.legend(loc="upper left", fontsize=8, framealpha=0.9)
        return figure
    totals = source.stats().read_by_reason
    bars = panel.barh(
        list(totals), [count / _MIB for count in totals.values()], color=list(_REASONS.values())
    )
    panel.bar_label(bars, labels=[f" {count / _MIB:.1f} MiB" for count in totals.values()])
    panel.invert_yaxis()
    panel.margins(x=0.15)
    panel.set(xlabel="MiB read", title="Bytes read, by reason")
    return figure


def timeline_figure(
    source: Session | Sequence[Span],
    *,
    forwards: int | None = None,
    axes: Axes | None = None,
) -> Figure:
    """What ran when, one lane per kind of work, over the last few MoE layers.

    Args:
        source: A session, or spans as `Session.spans` gives them.
        forwards: How many of the newest layer forwards to show; a session's default is one token.
        axes: Where to draw.
    """
    spans = source if isinstance(source, Sequence) else source.spans()
    if forwards is None:
        forwards = 8 if isinstance(source, Sequence) else source.store.num_layers
    runs = sorted((span for span in spans if span[0] == "forward"), key=lambda span: span[1])
    shown = runs[-forwards:]
    figure, panel = new_axes(axes, width=10.0, height=3.2)
    panel.set(title=f"The last {len(shown)} layers of the run", xlabel="ms")
    if not shown:
        return figure
    begin, end = shown[0][1], shown[-1][2]
    lanes = [kind for kind in _LANES if any(span[0] == kind for span in spans)]
    for row, kind in enumerate(lanes):
        bars = [
            ((max(span[1], begin) - begin) * 1e3, (min(span[2], end) - max(span[1], begin)) * 1e3)
            for span in spans
            if span[0] == kind and span[2] > begin and span[1] < end
        ]
        rows = _stacked(bars)
        height = 0.76 / max(1, len(rows))
        for depth, bars_of_row in enumerate(rows):
            panel.broken_barh(
                bars_of_row,
                (row - 0.38 + depth * height, 0.85 * height),
                color=_LANES[kind][1],  # with an edge: a span of microseconds stays visible
                linewidth=0.8,
            )
    for span in shown:
        middle = ((span[1] + span[2]) / 2 - begin) * 1e3
        panel.text(
            middle, lanes.index("forward"), str(span[3]), ha="center", va="center", fontsize=8
        )
    panel.set_yticks(range(len(lanes)), [_LANES[kind][0] for kind in lanes])
    panel.set_xlim(0, (end - begin) * 1e3)
    panel.invert_yaxis()
    panel.grid(axis="x", linewidth=0.3)
    panel.set_title(f"The last {len(shown)} layers of the run (numbers: MoE layer)")
    return figure


def generation_figure(recording: Recording) -> Figure:
    """One page on a generation: residency, hits, bytes by reason, memory against the budget."""
    figure, (map_axes, hit_axes, byte_axes, memory_axes) = _page()
    residency_map(recording, axes=map_axes)
    hits_over_tokens(recording, axes=hit_axes)
    bytes_by_reason(recording, axes=byte_axes)
    memory_axes.plot(
        [step.resident_bytes / _MIB for step in recording.steps],
        color="#56B4E9",
        linewidth=4,
        label="in slots",
    )
    memory_axes.axhline(
        recording.budget_bytes / _MIB, color="black", linestyle="--", label="budget"
    )
    memory_axes.set(xlabel="token", ylabel="MiB", title="Expert bytes in memory")
    memory_axes.set_xlim(0, max(1, len(recording.steps) - 1))
    memory_axes.set_ylim(0, recording.budget_bytes / _MIB * 1.25)
    memory_axes.legend(loc="lower right", fontsize=8)
    return figure


def require_matplotlib() -> Any:
    """The class `Figure` of matplotlib.

    Raises:
        ConfigError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ConfigError(
            "figures: got no matplotlib, expected 3.8 or newer; pip install 'sluice[plot]'"
        ) from error
    return Figure


def new_axes(axes: Axes | None, *, width: float, height: float) -> tuple[Any, Any]:
    """The figure and axes to draw on: those given, else new ones of so many inches."""
    if axes is not None:
        return axes.figure, axes
    figure = require_matplotlib()(figsize=(width, height), layout="constrained")
    return figure, figure.add_subplot()


def _page() -> tuple[Any, tuple[Any, Any, Any, Any]]:
    figure = require_matplotlib()(figsize=(11, 9.5), layout="constrained")
    grid = figure.add_gridspec(3, 2)
    return figure, (
        figure.add_subplot(grid[0, :]),
        figure.add_subplot(grid[1, :]),
        figure.add_subplot(grid[2, 0]),
        figure.add_subplot(grid[2, 1]),
    )


def _stacked(bars: Sequence[tuple[float, float]]) -> list[list[tuple[float, float]]]:
    """Bars (begin, width) in as few rows as keep those of a row apart, so that depth shows."""
    rows: list[list[tuple[float, float]]] = []
    for begin, width in sorted(bars):
        for row in rows:
            if sum(row[-1]) <= begin:
                row.append((begin, width))
                break
        else:
            rows.append([(begin, width)])
    return rows


def _name_runs(axes: Axes, recording: Recording) -> None:
    """Writes each label over its run of tokens, where there is more than one."""
    runs = [
        (label, [i for i, _ in group])
        for label, group in groupby(enumerate(recording.steps), key=lambda item: item[1].label)
    ]
    if len(runs) < 2:
        return
    for label, at in runs:
        axes.annotate(
            label,
            (at[0], 1.0),
            xycoords=("data", "axes fraction"),
            xytext=(0, 3),
            textcoords="offset points",
            rotation=90,
            va="bottom",
            ha="left",
            fontsize=8,
        )
