"""What stands in sluice's way on a machine: each problem with one line of advice."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass

from sluice.doctor.machine import Machine
from sluice.hf.compat import SUPPORTED
from sluice.text import format_bytes

_GIB = 1 << 30
_LEAST_TORCH = (2, 10)  # pyproject.toml
_RAM_FILE_SYSTEMS = frozenset({"tmpfs", "ramfs", "devtmpfs"})
_REMOTE_FILE_SYSTEMS = frozenset({"nfs", "nfs4", "cifs", "smb3", "fuse", "9p", "virtiofs"})


@dataclass(frozen=True, slots=True)
class Finding:
    """One problem.

    Args:
        name: A short name that scripts can test for.
        severity: "problem" (something will fail or be slow) or "note" (good to know).
        found: What is the case.
        advice: What to do about it, in one line.
    """

    name: str
    severity: str
    found: str
    advice: str

    def to_dict(self) -> dict[str, str]:
        """As JSON spells it."""
        return asdict(self)


def examine(machine: Machine) -> list[Finding]:
    """Everything found, problems first."""
    found = [finding for check in _CHECKS for finding in check(machine)]
    return sorted(found, key=lambda finding: finding.severity != "problem")


def version_tuple(text: str) -> tuple[int, ...]:
    """The leading numbers of a version: "5.13.1.dev0" is (5, 13, 1)."""
    numbers: list[int] = []
    for part in text.split("+", maxsplit=1)[0].split("."):
        if not part.isdigit():
            break
        numbers.append(int(part))
    return tuple(numbers)


def _transformers(machine: Machine) -> Iterator[Finding]:
    least, below = (version_tuple(text) for text in re.findall(r"[\d.]+", SUPPORTED))
    version = machine.versions.get("transformers")
    if version is None:
        yield Finding(
            "transformers-missing",
            "problem",
            "transformers is not installed",
            "pip install 'sluice[hf]': without it sluice loads and plans no model",
        )
    elif not (least <= version_tuple(version) < below):
        yield Finding(
            "transformers-version",
            "problem",
            f"transformers {version} is outside {SUPPORTED}",
            "pip install 'sluice[hf]': only this window is tested",
        )


def _torch(machine: Machine) -> Iterator[Finding]:
    version = machine.versions.get("torch")
    if version is not None and version_tuple(version) < _LEAST_TORCH:
        yield Finding(
            "torch-version",
            "problem",
            f"torch {version} is older than 2.10",
            "pip install 'torch>=2.10': sluice's op is built on its stable interface",
        )


def _ops(machine: Machine) -> Iterator[Finding]:
    if not machine.ops:
        yield Finding(
            "ops-missing",
            "problem",
            "sluice was built without torch, so Python stands in for its op and holds the GIL",
            "install torch first, then reinstall sluice with --no-build-isolation",
        )


def _disk(machine: Machine) -> Iterator[Finding]:
    if machine.file_system in _RAM_FILE_SYSTEMS:
        yield Finding(
            "cache-in-ram",
            "problem",
            f"{machine.folder} is on {machine.file_system}: what sluice writes there takes RAM",
            "set SLUICE_CACHE to a folder on a disk",
        )
    elif machine.file_system.split(".")[0] in _REMOTE_FILE_SYSTEMS:
        yield Finding(
            "cache-remote",
            "note",
            f"{machine.folder} is on {machine.file_system}, which may be a network",
            "set SLUICE_CACHE to a folder on a local disk",
        )
    if not machine.direct_reads:
        yield Finding(
            "no-direct-reads",
            "problem",
            f"{machine.folder} ({machine.file_system}) refuses O_DIRECT, so reads pass through "
            "the page cache",
            "keep checkpoints and SLUICE_CACHE on ext4, xfs or btrfs; each buffered read is "
            "counted in stats().degradations",
        )
    if machine.disk_free_bytes < 4 * _GIB:
        yield Finding(
            "little-disk",
            "problem",
            f"{format_bytes(machine.disk_free_bytes)} free in {machine.folder}",
            "sluice doctor --clean, or set SLUICE_CACHE to a larger disk: packs are as large as "
            "the experts",
        )


def _memory(machine: Machine) -> Iterator[Finding]:
    limit = machine.cgroup_limit_bytes
    if limit is not None and limit < machine.ram_bytes:
        yield Finding(
            "cgroup-limit",
            "note",
            f"a control group limits this process to {format_bytes(limit)} of "
            f"{format_bytes(machine.ram_bytes)}",
            "choose device_memory below that limit less the dense part of the model",
        )
    if machine.ram_free_bytes < _GIB:
        yield Finding(
            "little-ram",
            "problem",
            f"{format_bytes(machine.ram_free_bytes)} of RAM is free",
            "end other programs or choose a smaller device_memory: swapping costs more than a miss",
        )
    if machine.huge_pages == "never":
        yield Finding(
            "huge-pages-off",
            "note",
            "transparent huge pages are off",
            "echo madvise > /sys/kernel/mm/transparent_hugepage/enabled: slots are read with "
            "fewer TLB misses",
        )


def _cpu(machine: Machine) -> Iterator[Finding]:
    if machine.isa not in {"avx512", "avx2"}:
        yield Finding(
            "plain-kernels",
            "problem",
            f"the CPU tier is {machine.isa}: no AVX2",
            "expect experts to be computed by plain loops; results are the same, slower",
        )
    threads = os.environ.get("OMP_NUM_THREADS", "")
    if threads.isdigit() and int(threads) < machine.cores:
        yield Finding(
            "few-threads",
            "note",
            f"OMP_NUM_THREADS={threads} on {machine.cores} cores",
            "unset it, or call torch.set_num_threads: torch and sluice share one thread count",
        )


def _gpu(machine: Machine) -> Iterator[Finding]:
    gpu = machine.gpu
    if gpu is None or gpu.link_width is None or gpu.link_width_max is None:
        return
    if gpu.link_width < gpu.link_width_max:
        yield Finding(
            "narrow-link",
            "problem",
            f"{gpu.name} runs on x{gpu.link_width} of its x{gpu.link_width_max} PCIe lanes",
            "move the card to a full slot, or look for what shares its lanes: every missed expert "
            "comes over them",
        )


_CHECKS: tuple[Callable[[Machine], Iterator[Finding]], ...] = (
    _transformers,
    _torch,
    _ops,
    _disk,
    _memory,
    _cpu,
    _gpu,
)
