"""A session's numbers as a few lines for a person."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sluice.stats import Stats

_UNITS = ("B", "KiB", "MiB", "GiB", "TiB")
_REASONS = (
    ("demand", "bytes_read_demand"),
    ("hints used", "bytes_read_hint_used"),
    ("hints wasted", "bytes_read_hint_wasted"),
    ("hints pending", "bytes_read_hint_pending"),
)


def size_text(num_bytes: float) -> str:
    """An amount as a person reads it: "1.50 GiB"."""
    amount, unit = float(num_bytes), _UNITS[0]
    for name in _UNITS:
        unit = name
        if amount < 1024 or name == _UNITS[-1]:
            break
        amount /= 1024
    return f"{amount:.0f} {unit}" if unit == "B" else f"{amount:.2f} {unit}"


def report_text(stats: Stats, classes: Sequence[dict[str, Any]], source: str, policy: str) -> str:
    """Budget, slots, hits, bytes by reason, waiting, degradations and source.

    Args:
        stats: What to show; a difference of two snapshots works as well.
        classes: The memory plan's size classes.
        source: Where the experts come from.
        policy: Who leaves the slots.
    """
    slots = sum(entry["num_slots"] for entry in classes)
    experts = sum(entry["num_experts"] for entry in classes)
    lines = [
        f"sluice: {slots} of {experts} experts fit in {size_text(stats.budget_bytes)} "
        f"({policy}; {size_text(stats.slab_bytes)} of slots, "
        f"peak {size_text(stats.peak_resident_bytes)}, "
        f"workspace {size_text(stats.workspace_bytes)})",
        f"  source: {source}"
        + (f", {size_text(stats.host_bytes)} in RAM" if stats.host_bytes else ""),
        f"  {stats.tokens} tokens through {stats.forwards} layer calls in {stats.waves} waves",
        f"  {stats.requests} expert requests: {100 * stats.hit_rate:.1f} % hits, "
        f"{stats.late} late, {stats.misses} misses, {stats.evictions} evictions",
        f"  {_read_text(stats)}",
        f"  waited {stats.stall_s:.3f} s for experts, computed {stats.compute_s:.3f} s",
    ]
    if stats.hints:
        lines.append(f"  {stats.hints} hints, {stats.hints_dropped} dropped")
    if stats.generic_gate_calls:
        lines.append(f"  {stats.generic_gate_calls} calls of gates without a kernel")
    if stats.degradations:
        counted = ", ".join(f"{name} x {count}" for name, count in stats.degradations.items())
        lines.append(f"  degraded: {counted}")
    return "\n".join(lines)


def _read_text(stats: Stats) -> str:
    reasons = [
        f"{name} {size_text(getattr(stats, key))}" for name, key in _REASONS if getattr(stats, key)
    ]
    text = f"read {size_text(stats.bytes_read)}"
    if reasons:
        text += f" ({', '.join(reasons)})"
    if stats.bytes_read_demand and stats.demand_s > 0:
        rate = stats.bytes_read_demand / stats.demand_s / 1e9
        text += f", {rate:.2f} GB/s while demands were in flight"
    return text
