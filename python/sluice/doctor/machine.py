"""Facts about the machine that are read, not measured."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import mmap
import os
import platform
import shutil
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from sluice import _core
from sluice.doctor.gpu import Gpu, find_gpu
from sluice.memory import cgroup_limit, meminfo, read_text

_BLOCK_BYTES = 4096


@dataclass(frozen=True, slots=True)
class Machine:
    """The machine as this process sees it.

    Args:
        cpu: Model name.
        cores: Cores that this process may run on.
        isa: Kernel tier in use: "avx512", "avx2" or plain.
        ram_bytes: All RAM.
        ram_free_bytes: What the kernel says is available without swapping.
        cgroup_limit_bytes: Least memory limit of this process's control groups; None without one.
        huge_pages: Setting of transparent huge pages: "always", "madvise", "never" or "unknown".
        folder: Where sluice writes and where the disk was looked at.
        file_system: Type of the file system there.
        disk_free_bytes: Free bytes there.
        direct_reads: Whether O_DIRECT reads work there.
        ops: Whether the torch op was built in (else Python stands in for it).
        versions: python, kernel, sluice and of torch, transformers, accelerate, safetensors what
            is installed.
        gpu: The first GPU; None without one.
        cuda: What this build has of CUDA: "none", "runtime", or "emulated" in tests.
    """

    cpu: str
    cores: int
    isa: str
    ram_bytes: int
    ram_free_bytes: int
    cgroup_limit_bytes: int | None
    huge_pages: str
    folder: str
    file_system: str
    disk_free_bytes: int
    direct_reads: bool
    ops: bool
    versions: dict[str, str]
    gpu: Gpu | None = None
    cuda: str = "none"

    def to_dict(self) -> dict[str, Any]:
        """As JSON spells it."""
        return asdict(self)


def identity_of(folder: Path) -> dict[str, str | int]:
    """What measured constants belong to: other values, other constants. Writes nothing."""
    gpu = find_gpu()
    return {
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)),
        "kernel": platform.release(),
        "file_system": _file_system(folder),
        "device": folder.stat().st_dev,
        **(gpu.identity() if gpu is not None else {}),
    }


def look(folder: Path) -> Machine:
    """Reads the facts; `folder` is made if it is not there."""
    folder.mkdir(parents=True, exist_ok=True)
    memory = meminfo()
    return Machine(
        cpu=_cpu_model(),
        cores=len(os.sched_getaffinity(0)),
        isa=str(_core.build_info()["cpu_isa"]),
        ram_bytes=memory.get("MemTotal", 0),
        ram_free_bytes=memory.get("MemAvailable", 0),
        cgroup_limit_bytes=cgroup_limit(),
        huge_pages=_huge_pages(),
        folder=str(folder),
        file_system=_file_system(folder),
        disk_free_bytes=shutil.disk_usage(folder).free,
        direct_reads=_direct_reads(folder),
        ops=importlib.util.find_spec("sluice._ops") is not None,
        versions=_versions(),
        gpu=find_gpu(),
        cuda=str(_core.build_info()["cuda"]),
    )


def _cpu_model() -> str:
    for line in read_text(Path("/proc/cpuinfo")).splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _huge_pages() -> str:
    text = read_text(Path("/sys/kernel/mm/transparent_hugepage/enabled"))
    _, bracket, rest = text.partition("[")
    return rest.partition("]")[0] if bracket else "unknown"


def _file_system(folder: Path) -> str:
    """Type of the mount with the longest path above `folder`."""
    target, best = str(folder.resolve()), ("", "unknown")
    for line in read_text(Path("/proc/self/mountinfo")).splitlines():
        before, _, after = line.partition(" - ")
        mount = before.split()[4].replace("\\040", " ")
        inside = target == mount or target.startswith(mount.rstrip("/") + "/")
        if inside and len(mount) >= len(best[0]):
            best = (mount, after.split()[0])
    return best[1]


def _direct_reads(folder: Path) -> bool:
    """Whether one aligned block comes back through O_DIRECT."""
    with tempfile.NamedTemporaryFile(dir=folder, prefix="doctor-", suffix=".tmp") as file:
        file.write(b"\1" * _BLOCK_BYTES)
        file.flush()
        os.fsync(file.fileno())
        try:
            direct = os.open(file.name, os.O_RDONLY | os.O_DIRECT)
        except OSError:
            return False
        try:
            with mmap.mmap(-1, _BLOCK_BYTES) as block:
                return os.preadv(direct, [block], 0) == _BLOCK_BYTES
        except OSError:
            return False
        finally:
            os.close(direct)


def _versions() -> dict[str, str]:
    found = {
        "python": platform.python_version(),
        "kernel": platform.release(),
        "sluice": _core.version(),
    }
    for name in ("torch", "transformers", "accelerate", "safetensors"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
