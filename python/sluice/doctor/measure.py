"""The constants of the limit model, measured here and kept with the machine they belong to."""

from __future__ import annotations

import json
import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from sluice import _core
from sluice.doctor.device import DeviceConstants, measure_device
from sluice.doctor.machine import Machine, identity_of
from sluice.errors import IoError

_MIB = 1 << 20
_FILE = "doctor.json"
# Four times the last-level cache of the largest desktop parts, so that caches cannot serve it.
_MEMORY_BYTES = 384 * _MIB


@dataclass(frozen=True, slots=True)
class Constants:
    """Bandwidths of one machine.

    Args:
        memory_bytes_per_s: Read loop over memory, all threads.
        disk_bytes_per_s: O_DIRECT reads by "<threads>x<chunk MiB>MiB", such as "4x1MiB".
        seconds: How long measuring took.
        device: The first GPU's figures; None on a machine without one.
    """

    memory_bytes_per_s: float
    disk_bytes_per_s: dict[str, float]
    seconds: float
    device: DeviceConstants | None = None

    @property
    def best_disk_bytes_per_s(self) -> float:
        """The fastest of the disk's figures; 0 where O_DIRECT does not work."""
        return max(self.disk_bytes_per_s.values(), default=0.0)

    def to_dict(self) -> dict[str, Any]:
        """As JSON spells it."""
        return asdict(self)


def measure(
    machine: Machine, *, full: bool = False, progress: Callable[[int, int], None] | None = None
) -> Constants:
    """Measures memory, disk and the first GPU; a few seconds, with `full` at most a minute.

    Raises:
        IoError: The folder's disk has no room for the file that is read.
        DeviceError: A call of the GPU failed.
        CapacityError: The GPU's memory or the RAM has no room for the probes.
    """
    begin_s = time.monotonic()
    threads = (1, 4, 16) if full else (1, 4)
    steps = 2 + len(threads) * 2 + (machine.gpu is not None)
    done = 0

    def advance() -> None:
        nonlocal done
        done += 1
        if progress is not None:
            progress(done, steps)

    block = torch.ones(_MEMORY_BYTES // 4, dtype=torch.int32)
    memory = _core.read_bandwidth(
        _core.Parallel(), block.data_ptr(), _MEMORY_BYTES, 16 if full else 4
    )
    del block
    advance()
    disk: dict[str, float] = {}
    if machine.direct_reads:
        num_bytes = (1024 if full else 128) * _MIB
        path = _scratch_file(Path(machine.folder), num_bytes)
        try:
            advance()
            for depth in threads:
                for chunk in (1, 4):
                    disk[f"{depth}x{chunk}MiB"] = _core.disk_bandwidth(
                        path, 0, num_bytes, chunk * _MIB, depth
                    )
                    advance()
        finally:
            os.unlink(path)
    device: DeviceConstants | None = None
    if machine.gpu is not None:
        device = measure_device(machine.gpu.device, machine.gpu.name, full=full)
        advance()
    return Constants(memory, disk, time.monotonic() - begin_s, device)


def store_constants(folder: Path, constants: Constants) -> Path:
    """Keeps the constants beside what else sluice writes, with the machine's identity."""
    path = folder / _FILE
    record = {"identity": identity_of(folder), "constants": constants.to_dict()}
    draft = path.with_suffix(f".{os.getpid()}.tmp")
    draft.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    draft.replace(path)
    return path


def load_constants(folder: Path) -> Constants | None:
    """The constants of this machine; None when there are none, or another machine's."""
    try:
        record = json.loads((folder / _FILE).read_text(encoding="utf-8"))
        if record["identity"] != identity_of(folder):
            return None
        fields = record["constants"]
        device = fields.pop("device", None)
        return Constants(**fields, device=None if device is None else DeviceConstants(**device))
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _scratch_file(folder: Path, num_bytes: int) -> str:
    """A file of bytes that no file system can leave out, synced and out of the page cache."""
    free = os.statvfs(folder)
    if free.f_bavail * free.f_frsize < 2 * num_bytes:
        raise IoError(
            f"{folder}: got {free.f_bavail * free.f_frsize} free bytes, expected "
            f"{2 * num_bytes} to measure the disk; free some, or set SLUICE_CACHE to another disk"
        )
    descriptor, path = tempfile.mkstemp(dir=folder, prefix="doctor-", suffix=".tmp")
    try:
        block = os.urandom(4 * _MIB)
        for _ in range(num_bytes // len(block)):
            os.write(descriptor, block)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    except BaseException:
        os.unlink(path)
        raise
    finally:
        os.close(descriptor)
    return path
