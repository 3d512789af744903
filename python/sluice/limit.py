"""The physical limit of a run: what its bytes take at this machine's measured bandwidths."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sluice.stats import Stats

if TYPE_CHECKING:
    from sluice.doctor import Constants
    from sluice.session import Session


@dataclass(frozen=True, slots=True)
class Limit:
    """The least seconds that some steps could take, bandwidths only.

    The dense part is read from memory, then experts are computed while others arrive: `dense_s +
    max(experts_s, disk_s)`. Latencies, launches and Python are left out on purpose: they are what
    `achieved` shows.

    Args:
        disk_s: Bytes demanded by the disk's rate.
        experts_s: Bytes of every expert asked for by the memory's rate.
        dense_s: Bytes of everything else by the memory's rate.
    """

    disk_s: float
    experts_s: float
    dense_s: float

    @property
    def seconds(self) -> float:
        """The sum as above."""
        return self.dense_s + max(self.experts_s, self.disk_s)

    @property
    def bound(self) -> str:
        """The largest term."""
        terms = {"disk": self.disk_s, "experts": self.experts_s, "dense": self.dense_s}
        return max(terms, key=lambda name: terms[name])

    def to_dict(self, seconds: float) -> dict[str, Any]:
        """As JSON spells it, beside the seconds that were measured."""
        return {
            "limit_s": self.seconds,
            "disk_s": self.disk_s,
            "experts_s": self.experts_s,
            "dense_s": self.dense_s,
            "bound": self.bound,
            "achieved": self.seconds / seconds,
        }


def limit_of(session: Session, spent: Stats, constants: Constants, dense_bytes: int) -> Limit:
    """The limit of what happened between two snapshots.

    Args:
        session: Whose experts they are.
        spent: The difference of the snapshots.
        constants: Measured by `sluice doctor`.
        dense_bytes: Read from memory in every step, beside the experts.
    """
    layers = [session.store.layer(index) for index in range(session.store.num_layers)]
    expert_bytes = sum(int(layer["expert_bytes"]) for layer in layers) / len(layers)
    steps = spent.forwards / len(layers)
    disk = constants.best_disk_bytes_per_s
    return Limit(
        disk_s=spent.bytes_read_demand / disk if disk else 0.0,
        experts_s=spent.requests * expert_bytes / constants.memory_bytes_per_s,
        dense_s=steps * dense_bytes / constants.memory_bytes_per_s,
    )
