"""The constants of a GPU: what its link, its memory, launches and pinned memory give here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from sluice import _core
from sluice.text import format_bytes

_KIB, _MIB, _GIB = 1 << 10, 1 << 20, 1 << 30
# Where the engine's chunks lie: what `link_bytes_per_s` is the rate of.
_CHUNK_BYTES = 4 * _MIB
# Copies in flight: one at a time, and so many that the queue is never empty.
_ALONE, _QUEUED = 1, 64


@dataclass(frozen=True, slots=True, kw_only=True)
class ProbeSizes:
    """How much is moved to measure with.

    Args:
        copy_bytes: Sizes of copies.
        copy_total_bytes: Moved in each series of copies, at least one turn of its depth.
        depths: Copies in flight, a series for each.
        read_bytes: Device memory that is read; less where less is free.
        host_bytes: RAM that is read alone and beside copies.
        pin_bytes: RAM that is pinned, and copied into by one thread.
        repeats: Series, of which the median counts.
    """

    copy_bytes: tuple[int, ...] = tuple(256 * _KIB << step for step in range(9))
    copy_total_bytes: int = 128 * _MIB
    depths: tuple[int, ...] = (_ALONE, _QUEUED)
    read_bytes: int = 4 * _GIB
    host_bytes: int = 384 * _MIB
    pin_bytes: int = 256 * _MIB
    repeats: int = 5


FULL_SIZES = ProbeSizes(depths=(_ALONE, 2, 4, _QUEUED), copy_total_bytes=256 * _MIB, pin_bytes=_GIB)
# The emulation of the tests has no rates: only the structure is of interest, and that it ends.
_EMULATED_SIZES = ProbeSizes(
    copy_bytes=(64 * _KIB, 128 * _KIB, 256 * _KIB),
    copy_total_bytes=256 * _KIB,
    depths=(_ALONE, 2),
    read_bytes=256 * _KIB,
    host_bytes=_MIB,
    pin_bytes=_MIB,
    repeats=1,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceConstants:
    """What one GPU gives on this machine.

    Args:
        name: The GPU's name, as the driver tells it.
        device: "cuda:N", which one was measured.
        memory_bytes_per_s: A kernel that reads the device's memory and nothing else.
        link_bytes_per_s: Copies of 4 MiB from pinned memory to the device, always some in flight.
        link_latency_s: t0 of t = t0 + bytes/rate, fitted over sizes: one copy alone, as the host
            sees it.
        link_queued_latency_s: The same with others in flight.
        back_bytes_per_s: Copies of 4 MiB from the device to pinned memory, always some in flight.
        pageable_bytes_per_s: Copies of 4 MiB to the device from memory that is not pinned.
        copies_bytes_per_s: Every series: "to device, pinned, 1 in flight" → size → rate.
        launch_s: One launch of an empty kernel more, in a full queue.
        round_trip_s: A kernel's result to the host, and a copy that waited for it back.
        pin_bytes_per_s: Pinning of memory that was touched before.
        staging_bytes_per_s: One thread's copy from ordinary to pinned memory.
        host_bytes_per_s: Reads of RAM by all cores, nothing else running.
        host_beside_copies_bytes_per_s: The same while copies to the device run.
        link_beside_reads_bytes_per_s: What those copies got meanwhile.
    """

    name: str
    device: str
    memory_bytes_per_s: float
    link_bytes_per_s: float
    link_latency_s: float
    link_queued_latency_s: float
    back_bytes_per_s: float
    pageable_bytes_per_s: float
    copies_bytes_per_s: dict[str, dict[str, float]]
    launch_s: float
    round_trip_s: float
    pin_bytes_per_s: float
    staging_bytes_per_s: float
    host_bytes_per_s: float
    host_beside_copies_bytes_per_s: float
    link_beside_reads_bytes_per_s: float

    def to_dict(self) -> dict[str, Any]:
        """As JSON spells it."""
        return asdict(self)


def measure_device(device: str, name: str, *, full: bool = False) -> DeviceConstants:
    """Measures one GPU; seconds, with `full` some more.

    Args:
        device: "cuda:N".
        name: What it is called, for the record.
        full: More depths, larger probes.

    Raises:
        DeviceError: There is no such device, or a call of it failed.
        CapacityError: Its memory or the RAM has no room for the probes.
    """
    sizes = FULL_SIZES if full else ProbeSizes()
    if _core.build_info()["cuda"] == "emulated":
        sizes = _EMULATED_SIZES
    return constants_of(_core.measure_device(device, **asdict(sizes)), device, name)


def constants_of(found: dict[str, Any], device: str, name: str) -> DeviceConstants:
    """What `_core.measure_device` found, with the fits over the sizes of copies."""
    series: dict[tuple[str, str, int], list[tuple[int, float]]] = {}
    for copy in found["copies"]:
        key = (copy["direction"], copy["memory"], copy["depth"])
        series.setdefault(key, []).append((copy["bytes"], copy["seconds"]))
    deepest = max(depth for _, _, depth in series)
    alone = fit_latency(series["to device", "pinned", _ALONE])
    queued = fit_latency(series["to device", "pinned", deepest])
    return DeviceConstants(
        name=name,
        device=device,
        memory_bytes_per_s=found["memory_bytes_per_s"],
        link_bytes_per_s=_rate_of_chunks(series["to device", "pinned", deepest]),
        link_latency_s=alone[0],
        link_queued_latency_s=queued[0],
        back_bytes_per_s=_rate_of_chunks(series["to host", "pinned", deepest]),
        pageable_bytes_per_s=_rate_of_chunks(series["to device", "pageable", _ALONE]),
        copies_bytes_per_s={
            f"{direction}, {memory}, {depth} in flight": {
                format_bytes(size): size / seconds for size, seconds in copies
            }
            for (direction, memory, depth), copies in series.items()
        },
        **{
            key: found[key]
            for key in (
                "launch_s",
                "round_trip_s",
                "pin_bytes_per_s",
                "staging_bytes_per_s",
                "host_bytes_per_s",
                "host_beside_copies_bytes_per_s",
                "link_beside_reads_bytes_per_s",
            )
        },
    )


def fit_latency(copies: Sequence[tuple[int, float]]) -> tuple[float, float]:
    """(t0, bytes/s) of t = t0 + bytes/rate by least squares of the relative error.

    Relative, because copies of 64 MiB take a thousand times what t0 is: their noise would be all
    that an absolute fit sees. t0 is at least 0.

    Args:
        copies: (bytes, seconds), of at least two sizes.
    """
    # Divided by t the model is 1 = t0·u + s·v with u = 1/t, v = bytes/t: two normal equations.
    rows = [(1 / seconds, size / seconds) for size, seconds in copies]
    uu = sum(u * u for u, _ in rows)
    uv = sum(u * v for u, v in rows)
    vv = sum(v * v for _, v in rows)
    u_sum, v_sum = sum(u for u, _ in rows), sum(v for _, v in rows)
    determinant = uu * vv - uv * uv
    latency_s = (u_sum * vv - v_sum * uv) / determinant
    if latency_s > 0:
        return latency_s, determinant / (uu * v_sum - uv * u_sum)
    return 0.0, vv / v_sum


def _rate_of_chunks(copies: Sequence[tuple[int, float]]) -> float:
    """Bytes/s at the engine's chunk, or at the largest size below it."""
    size, seconds = max([copy for copy in copies if copy[0] <= _CHUNK_BYTES] or [min(copies)])
    return size / seconds
