"""The numbers of a session."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

_GAUGES = frozenset(
    {
        "resident_bytes",
        "peak_resident_bytes",
        "budget_bytes",
        "slab_bytes",
        "workspace_bytes",
        "adopted_bytes",
        "host_tier_bytes",
        "host_filled_bytes",
        "pinned_bytes",
    }
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Stats:
    """Exact counters since the session was made, and what it holds now.

    `requests == hits + late + misses`, per call of a layer and distinct expert, however many waves
    the call took. `later - earlier` is what happened between two snapshots; what is held now
    (`resident_bytes`, `peak_resident_bytes`, `budget_bytes`, `slab_bytes`, `workspace_bytes`,
    `adopted_bytes`, `host_tier_bytes`, `host_filled_bytes`, `pinned_bytes`) is that of the later.

    Args:
        forwards: Calls of MoE layers.
        tokens: Tokens over those calls.
        requests: Experts asked for.
        hits: Ready when the layer asked.
        late: On their way by a hint when the layer asked.
        misses: Neither.
        waves: Rounds through the slots; one per call that fits.
        evictions: Experts that left their slot.
        hints: Guesses given.
        hints_dropped: Guesses refused, expired or cancelled.
        hints_distrusted: Of these, refused because too few came true lately.
        bytes_read: Physical bytes into slots, from the disk or, beside a GPU, over its link: the
            sum of the four reasons.
        bytes_read_demand: …because a layer waited for them.
        bytes_read_hint_used: …by a guess that came true.
        bytes_read_hint_wasted: …by a guess that did not.
        bytes_read_hint_pending: …by a guess that nobody has asked for yet.
        stall_s: The caller waited for bytes; beside a GPU, until their copies were enqueued.
        demand_s: Demands were in flight (first submission to last landing, summed over calls);
            beside a GPU a copy has landed when it is enqueued.
        compute_s: The caller spent in kernels, GEMM and combine; beside a GPU, enqueueing them.
        generic_gate_calls: Calls of a gate that has no kernel.
        resident_bytes: Slots that hold an expert or wait for one.
        peak_resident_bytes: The most that was.
        budget_bytes: What `device_memory` allows.
        slab_bytes: Allocated for slots; never above the budget.
        workspace_bytes: Bounce buffers and scratch, beside the budget.
        adopted_bytes: Experts of an adopted model that stay in RAM, beside the budget.
        host_hits: Beside a GPU: loads whose expert was in the host tier.
        host_misses: …loads for which the store was read.
        store_bytes_read: Physical bytes from files, whatever for.
        host_tier_bytes: Allocated for slots of the host tier; never above `host_memory`.
        host_filled_bytes: Of these, slots that hold an expert.
        pinned_bytes: Of these, memory that the copy engine reads without staging.
        degradations: What works less well than it could: name → times.

    Units: bytes and seconds.
    """

    forwards: int = 0
    tokens: int = 0
    requests: int = 0
    hits: int = 0
    late: int = 0
    misses: int = 0
    waves: int = 0
    evictions: int = 0
    hints: int = 0
    hints_dropped: int = 0
    hints_distrusted: int = 0
    bytes_read: int = 0
    bytes_read_demand: int = 0
    bytes_read_hint_used: int = 0
    bytes_read_hint_wasted: int = 0
    bytes_read_hint_pending: int = 0
    stall_s: float = 0.0
    demand_s: float = 0.0
    compute_s: float = 0.0
    generic_gate_calls: int = 0
    resident_bytes: int = 0
    peak_resident_bytes: int = 0
    budget_bytes: int = 0
    slab_bytes: int = 0
    workspace_bytes: int = 0
    adopted_bytes: int = 0
    host_hits: int = 0
    host_misses: int = 0
    store_bytes_read: int = 0
    host_tier_bytes: int = 0
    host_filled_bytes: int = 0
    pinned_bytes: int = 0
    degradations: dict[str, int] = field(default_factory=dict[str, int])

    @classmethod
    def from_core(cls, fields: Mapping[str, Any]) -> Stats:
        """The core's snapshot, with its nanoseconds as seconds."""
        values = dict(fields)
        for name in ("stall", "demand", "compute"):
            values[f"{name}_s"] = values.pop(f"{name}_ns") * 1e-9
        return cls(**values)

    @property
    def hit_rate(self) -> float:
        """Hits over requests; 1.0 where nothing was asked for."""
        return self.hits / self.requests if self.requests else 1.0

    @property
    def read_by_reason(self) -> dict[str, int]:
        """`bytes_read` by its four reasons, in words."""
        return {
            "demand": self.bytes_read_demand,
            "hint used": self.bytes_read_hint_used,
            "hint wasted": self.bytes_read_hint_wasted,
            "hint pending": self.bytes_read_hint_pending,
        }

    def to_dict(self) -> dict[str, Any]:
        """All fields and the hit rate, as JSON can hold them."""
        return {**dataclasses.asdict(self), "hit_rate": self.hit_rate}

    def __sub__(self, earlier: Stats) -> Stats:
        values: dict[str, Any] = {}
        for entry in dataclasses.fields(self):
            name = entry.name
            now, then = getattr(self, name), getattr(earlier, name)
            if name == "degradations":
                counts = {key: count - then.get(key, 0) for key, count in now.items()}
                values[name] = {key: count for key, count in counts.items() if count}
            else:
                values[name] = now if name in _GAUGES else now - then
        return Stats(**values)


@dataclass(frozen=True, slots=True)
class HostTierProgress:
    """How far the host tier has come.

    Args:
        capacity_bytes: Allocated for its slots.
        filled_bytes: Slots whose expert is there.
        pinned_bytes: Memory that the copy engine reads without staging.
        pageable_bytes: Memory that stays unpinned: refused by the system, or beyond `pinned_cap`.
    """

    capacity_bytes: int
    filled_bytes: int
    pinned_bytes: int
    pageable_bytes: int

    @property
    def is_settled(self) -> bool:
        """Whether every arena is as full as it will be, and pinned or never to be."""
        return self.pinned_bytes + self.pageable_bytes == self.capacity_bytes
