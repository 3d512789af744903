"""Whose rates: those that doctor measured here, or those of machines that are assumed by name."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sluice.limit.model import Rates

if TYPE_CHECKING:
    from sluice.doctor import Constants

# Large copies from pinned memory over PCIe 5 x16 and 4 x16: nvbandwidth's published runs, and
# cuda-oxide pull request 976. Memory: what a read-only kernel is expected to reach on an H200 of
# 4.8 TB/s; the same in both, so that the two differ by their link alone.
REFERENCE_MACHINES = (
    Rates(
        name="PCIe 5 x16, H200 class",
        memory_bytes_per_s=4.2e12,
        link_bytes_per_s=55e9,
        disk_bytes_per_s=7e9,
    ),
    Rates(
        name="PCIe 4 x16",
        memory_bytes_per_s=4.2e12,
        link_bytes_per_s=25e9,
        disk_bytes_per_s=7e9,
    ),
)
"""Assumptions for machines without a measured GPU; never what a run is held against."""


def host_rates(constants: Constants) -> Rates:
    """Of a session whose slots are RAM."""
    return Rates(
        name="doctor",
        memory_bytes_per_s=constants.memory_bytes_per_s,
        host_bytes_per_s=constants.memory_bytes_per_s,
        disk_bytes_per_s=constants.best_disk_bytes_per_s,
    )


def device_rates(constants: Constants) -> Rates | None:
    """Of a session whose slots are a GPU's memory; None where none was measured."""
    device = constants.device
    if device is None:
        return None
    return Rates(
        name=f"doctor, {device.name}",
        memory_bytes_per_s=device.memory_bytes_per_s,
        link_bytes_per_s=device.link_bytes_per_s,
        link_latency_s=device.link_latency_s,
        host_bytes_per_s=constants.memory_bytes_per_s,
        disk_bytes_per_s=constants.best_disk_bytes_per_s,
        launch_s=device.launch_s,
        fetch_s=device.round_trip_s,
    )
