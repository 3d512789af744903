"""The physical limit of what a session did, and where the rest of its time went."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sluice import _core
from sluice.limit.machines import device_rates, host_rates
from sluice.limit.model import LayerWork, Rates, Terms, layer_terms, link_seconds
from sluice.stats import Stats

if TYPE_CHECKING:
    from sluice.doctor import Constants
    from sluice.session import Session


@dataclass(frozen=True, slots=True)
class Limit:
    """The least seconds that some steps could take, bandwidths only.

    The dense part is read from the slots' memory, then experts are computed while others arrive:
    `dense_s + max(experts_s, disk_s, h2d_s)`. Latencies, launches and Python are left out on
    purpose: they are what `achieved` shows.

    Args:
        disk_s: Bytes from files that the steps needed, by the disk's rate.
        experts_s: Bytes of every expert asked for by the slots' memory's rate.
        dense_s: Bytes of everything else by the same.
        h2d_s: Beside a GPU, bytes over its link that the steps needed, hints that came true with
            them, by its rate; None where slots are RAM.
        h2d_bytes_per_s: The link's rate.
        prefetched_s: What of `h2d_s` hints brought before it was asked for: it may have hidden
            behind any other term.
        wasted_s: Link time of hints that did not come true; no part of the limit.
        hand_offs: Calls in which the host waited for the GPU's routing: each MoE layer of a step.
        hand_off_s: What one of them takes, measured; no part of the limit.
        constants: Whose rates they are.
    """

    disk_s: float
    experts_s: float
    dense_s: float
    h2d_s: float | None = None
    h2d_bytes_per_s: float = 0.0
    prefetched_s: float = 0.0
    wasted_s: float = 0.0
    hand_offs: int = 0
    hand_off_s: float = 0.0
    constants: str = "doctor"

    @property
    def seconds(self) -> float:
        """The sum as above; what was prefetched is only bound by the link's own time."""
        h2d_s = self.h2d_s or 0.0
        asked = Terms(
            dense_s=self.dense_s,
            experts_s=self.experts_s,
            disk_s=self.disk_s,
            link_s=h2d_s - self.prefetched_s,
        )
        return max(asked.seconds, h2d_s)

    @property
    def bound(self) -> str:
        """The largest term: "disk", "experts", "dense", or "h2d" for the link."""
        terms = {"disk": self.disk_s, "experts": self.experts_s, "dense": self.dense_s}
        if self.h2d_s is not None:
            terms["h2d"] = self.h2d_s
        return max(terms, key=lambda name: terms[name])

    @property
    def overhead_s(self) -> float:
        """Known time outside of the limit: hand-offs between the GPU and the host."""
        return self.hand_offs * self.hand_off_s

    def unexplained_s(self, seconds: float) -> float:
        """What neither the limit nor what is known beside it accounts for."""
        return seconds - self.seconds - self.overhead_s - self.wasted_s

    def to_dict(self, seconds: float) -> dict[str, Any]:
        """As JSON spells it, beside the seconds that were measured.

        `limit_s`, `disk_s`, `experts_s`, `dense_s`, `bound` and `achieved` = limit / measured
        (above 1: the constants are stale). Beside a GPU also `h2d_s`, `h2d_bytes_per_s`,
        `wasted_hints_s`, `hand_offs`, `hand_off_s`, `overhead_s` (their product), `unexplained_s`
        and `constants` (whose they are).
        """
        fields: dict[str, Any] = {
            "limit_s": self.seconds,
            "disk_s": self.disk_s,
            "experts_s": self.experts_s,
            "dense_s": self.dense_s,
            "bound": self.bound,
            "achieved": self.seconds / seconds,
        }
        if self.h2d_s is not None:
            fields |= {
                "h2d_s": self.h2d_s,
                "h2d_bytes_per_s": self.h2d_bytes_per_s,
                "wasted_hints_s": self.wasted_s,
                "hand_offs": self.hand_offs,
                "hand_off_s": self.hand_off_s,
                "overhead_s": self.overhead_s,
                "unexplained_s": self.unexplained_s(seconds),
                "constants": self.constants,
            }
        return fields


def limit_of(
    session: Session, spent: Stats, constants: Constants, dense_bytes: int
) -> Limit | None:
    """The limit of what happened between two snapshots.

    Args:
        session: Whose experts they are.
        spent: The difference of the snapshots.
        constants: Measured by `sluice doctor`.
        dense_bytes: Read from memory in every step, beside the experts.

    Returns:
        None beside a GPU that was not the one measured.
    """
    layers = [session.store.layer(index) for index in range(session.store.num_layers)]
    expert_bytes = sum(int(layer["expert_bytes"]) for layer in layers) / len(layers)
    steps = spent.forwards / len(layers)
    if not _core.has_slots_apart(session.device):
        return host_limit(spent, host_rates(constants), expert_bytes, steps * dense_bytes)
    rates = device_rates(constants)
    measured = None if constants.device is None else constants.device.device
    if rates is None or session.device not in ("cpu", measured):  # emulated, a GPU is "cpu"
        return None
    return device_limit(spent, rates, expert_bytes, steps * dense_bytes)


def host_limit(spent: Stats, rates: Rates, expert_bytes: float, dense_bytes: float) -> Limit:
    """Where slots are RAM and misses come from the disk.

    Args:
        spent: What happened.
        rates: Of the machine.
        expert_bytes: Of an average expert.
        dense_bytes: Over all of its steps.
    """
    work = LayerWork(
        dense_bytes=dense_bytes,
        hit_bytes=spent.requests * expert_bytes,
        store_bytes=spent.bytes_read_demand,
    )
    terms = layer_terms(rates.bandwidths_only(), work)
    return Limit(disk_s=terms.disk_s, experts_s=terms.experts_s, dense_s=terms.dense_s)


def device_limit(spent: Stats, rates: Rates, expert_bytes: float, dense_bytes: float) -> Limit:
    """Beside a GPU: over its link, and from the disk what the host tier did not have.

    Arguments as `host_limit` takes them.
    """
    bandwidths = rates.bandwidths_only()
    needed = spent.bytes_read_demand + spent.bytes_read_hint_used
    # Of what was read from files the host tier's own filling is nothing that a step needed.
    from_store = min(spent.store_bytes_read, spent.host_misses * expert_bytes)
    work = LayerWork(
        dense_bytes=dense_bytes,
        hit_bytes=spent.requests * expert_bytes - needed,
        fetched_bytes=needed,
        store_bytes=from_store,
    )
    terms = layer_terms(bandwidths, work)
    return Limit(
        disk_s=terms.disk_s,
        experts_s=terms.experts_s,
        dense_s=terms.dense_s,
        h2d_s=terms.link_s,
        h2d_bytes_per_s=rates.link_bytes_per_s,
        prefetched_s=link_seconds(bandwidths, spent.bytes_read_hint_used),
        wasted_s=link_seconds(bandwidths, spent.bytes_read_hint_wasted),
        hand_offs=spent.forwards,
        hand_off_s=rates.fetch_s,
        constants=rates.name,
    )
