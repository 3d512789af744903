"""A session's numbers as a few lines for a person."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from sluice.stats import Stats
from sluice.text import format_bytes

if TYPE_CHECKING:
    from sluice.limit import Limit


def report_text(
    stats: Stats,
    classes: Sequence[dict[str, Any]],
    source: str,
    policy: str,
    link_bytes_per_s: float = 0.0,
) -> str:
    """Budget, slots, hits, bytes by reason, waiting, degradations and source.

    Args:
        stats: What to show; a difference of two snapshots works as well.
        classes: The memory plan's size classes.
        source: Where the experts come from.
        policy: Who leaves the slots.
        link_bytes_per_s: Beside a GPU, what doctor measured of its link; 0 where it has not.
    """
    slots = sum(entry["num_slots"] for entry in classes)
    experts = sum(entry["num_experts"] for entry in classes)
    lines = [
        f"sluice: {slots} of {experts} experts fit in {format_bytes(stats.budget_bytes)} "
        f"({policy}; {format_bytes(stats.slab_bytes)} of slots, "
        f"peak {format_bytes(stats.peak_resident_bytes)}, "
        f"workspace {format_bytes(stats.workspace_bytes)})",
        f"  source: {source}"
        + (f", {format_bytes(stats.adopted_bytes)} in RAM" if stats.adopted_bytes else ""),
        f"  {stats.tokens} tokens through {stats.forwards} layer calls in {stats.waves} waves",
        f"  {stats.requests} expert requests: {100 * stats.hit_rate:.1f} % hits, "
        f"{stats.late} late, {stats.misses} misses, {stats.evictions} evictions",
        f"  {_read_text(stats, link_bytes_per_s)}",
        f"  waited {stats.stall_s:.3f} s for experts, computed {stats.compute_s:.3f} s",
    ]
    if stats.host_tier_bytes:
        lines.append(
            f"  host tier: {format_bytes(stats.host_filled_bytes)} of "
            f"{format_bytes(stats.host_tier_bytes)} filled, {format_bytes(stats.pinned_bytes)} "
            f"pinned; {stats.host_hits} loads from it, {stats.host_misses} from the store "
            f"({format_bytes(stats.store_bytes_read)} read)"
        )
    if stats.hints:
        lines.append(
            f"  {stats.hints} hints, {stats.hints_dropped} dropped, "
            f"{stats.hints_distrusted} of them distrusted"
        )
    if stats.generic_gate_calls:
        lines.append(f"  {stats.generic_gate_calls} calls of gates without a kernel")
    if stats.degradations:
        counted = ", ".join(f"{name} x {count}" for name, count in stats.degradations.items())
        lines.append(f"  degraded: {counted}")
    return "\n".join(lines)


def phase_text(name: str, spent: Stats, limit: Limit, seconds: float, num_tokens: int) -> str:
    """What tokens beside a GPU took: speed, limit, bytes by reason, what is left to explain.

    Args:
        name: Of the phase: "decode". Figures behind it are per token.
        spent: What happened in it.
        limit: Its limit, of a session whose slots are a GPU's memory.
        seconds: What it took.
        num_tokens: How many tokens.
    """
    assert limit.h2d_s is not None, "a limit of a session whose slots are RAM"

    def ms(total_s: float) -> str:
        return f"{total_s / num_tokens * 1e3:.3g}"

    def gb(total_bytes: float) -> str:
        return f"{total_bytes / num_tokens / 1e9:.2g}"

    achieved = limit.seconds / seconds
    reasons = ", ".join(f"{why} {gb(count)}" for why, count in spent.read_by_reason.items())
    known = f"{limit.hand_offs / num_tokens:.3g} hand-offs x {limit.hand_off_s * 1e6:.1f} us"
    speed = (
        f"{name} {num_tokens} tok",
        f"{num_tokens / seconds:.3g} tok/s",
        f"{ms(seconds)} ms/tok",
        f"limit {ms(limit.seconds)} ms (h2d {ms(limit.h2d_s)}, disk {ms(limit.disk_s)}, "
        f"experts {ms(limit.experts_s)}, dense {ms(limit.dense_s)})",
        f"achieved {achieved:.2f}" + (", run `sluice doctor` again" if achieved > 1 else ""),
        f"bound: {limit.bound}",
    )
    moved = (
        f"hits {100 * spent.hit_rate:.1f} %",
        f"h2d {gb(spent.bytes_read)} GB @ {limit.h2d_bytes_per_s / 1e9:.1f} GB/s ({reasons})",
        f"disk {gb(spent.store_bytes_read)} GB",
    )
    rest = (
        f"wasted hints {ms(limit.wasted_s)} ms",
        f"known overhead {ms(limit.overhead_s)} ms ({known})",
        f"unexplained {ms(limit.unexplained_s(seconds))} ms",
        f"constants: {limit.constants}",
    )
    return "\n  ".join("   ".join(line) for line in (speed, moved, rest))


def _read_text(stats: Stats, link_bytes_per_s: float) -> str:
    reasons = [
        f"{why} {format_bytes(count)}" for why, count in stats.read_by_reason.items() if count
    ]
    text = f"{_over_link(stats)} {format_bytes(stats.bytes_read)}"
    if reasons:
        text += f" ({', '.join(reasons)})"
    if stats.bytes_read_demand and stats.demand_s > 0:
        rate = stats.bytes_read_demand / stats.demand_s / 1e9
        text += f", {rate:.2f} GB/s while demands were in flight"
        if link_bytes_per_s:
            share = rate * 1e9 / link_bytes_per_s
            text += f", achieved {share:.2f} of the link's {link_bytes_per_s / 1e9:.1f}"
    return text


def _over_link(stats: Stats) -> str:
    """Where `bytes_read` came from: beside a GPU it counts what its link carried."""
    return "over the link" if stats.host_tier_bytes or stats.store_bytes_read else "read"
