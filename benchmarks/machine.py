"""Provenance of a row: which code, which machine, which versions."""

import importlib.metadata
import json
import os
import platform
import re
import subprocess
from pathlib import Path
from typing import Any

from sluice.doctor import find_gpu
from sluice.folders import bench_folder

ROOT = Path(__file__).resolve().parents[1]


def _read(path: str) -> str:
    try:
        return Path(path).read_text()
    except OSError:
        return ""


def cpu_model() -> str:
    match = re.search(r"^model name\s*:\s*(.+)$", _read("/proc/cpuinfo"), re.MULTILINE)
    return match.group(1).strip() if match else platform.machine()


def last_level_cache_bytes() -> int:
    """The largest cache of CPU 0, as the kernel reports it; 32 MiB where it does not."""
    sizes = [0]
    for index in range(5):
        text = _read(f"/sys/devices/system/cpu/cpu0/cache/index{index}/size").strip()
        if text.endswith("K"):
            sizes.append(int(text[:-1]) << 10)
    return max(sizes) or 32 << 20


def machine() -> dict[str, Any]:
    """Hardware as the kernel reports it; no host name."""
    memory = re.search(r"MemTotal:\s+(\d+)", _read("/proc/meminfo"))
    cores = len(os.sched_getaffinity(0))
    memory_gib = int(memory.group(1)) / 2**20 if memory else 0
    return {
        "cpu": cpu_model(),
        "cores": cores,
        "llc_bytes": last_level_cache_bytes(),
        "ram_gib": round(memory_gib, 1),
        "kernel": platform.release().split("-")[0],
        "gpu": gpu(),
        "file_system": file_system(bench_folder()),
    }


def gpu() -> dict[str, Any] | None:
    """The first GPU as the driver and the kernel report it; None without one."""
    found = find_gpu()
    if found is None:
        return None
    return {
        "name": found.name,
        "count": found.count,
        "driver": found.driver,
        "link_width": found.link_width,
        "link_width_max": found.link_width_max,
        "link_speed_max": found.link_speed_max,
    }


def slug(description: dict[str, Any]) -> str:
    """A hardware name for the results folder: `amd-epyc-2c-24g`, behind a GPU's name."""
    cpu = re.sub(r"\(.*?\)|CPU|Processor|@.*", " ", description["cpu"])
    words = "-".join(re.findall(r"[a-z0-9]+", cpu.lower())[:4])
    if description["gpu"] is not None:
        name = description["gpu"]["name"].lower()
        words = "-".join([*re.findall(r"[a-z0-9]+", name)[:4], words])
    return f"{words}-{description['cores']}c-{round(description['ram_gib'])}g"


def file_system(path: Path) -> str:
    """Type of the file system that `path` lies on."""
    path.mkdir(parents=True, exist_ok=True)
    result = subprocess.run(
        ["stat", "-f", "-c", "%T", str(path)], capture_output=True, text=True, check=False
    )
    return result.stdout.strip()


def commit() -> tuple[str, bool]:
    """Our commit, and whether the tree differs from it (results apart).

    Where git knows nothing of the tree, what SLUICE_COMMIT says of it; without that it is dirty.
    """

    def git(*args: str) -> str:
        command = ["git", "-C", str(ROOT), *args]
        try:
            run = subprocess.run(command, capture_output=True, text=True, check=False)
        except FileNotFoundError:
            return ""
        return run.stdout.strip()

    revision = git("rev-parse", "--short=12", "HEAD")
    if not revision:
        told = os.environ.get("SLUICE_COMMIT", "")
        return told.removesuffix("-dirty") or "unknown", not told or told.endswith("-dirty")
    changed = git(
        "status", "--porcelain", "--untracked-files=no", "--", ".", ":!benchmarks/results"
    )
    return revision, bool(changed)


def versions() -> dict[str, str]:
    names = ("torch", "transformers", "accelerate", "safetensors", "sluice")
    found = {"python": platform.python_version()}
    for name in names:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = ""
    return found


def resident_set_bytes() -> dict[str, int]:
    """Peak resident set and current anonymous memory of this process."""
    status = _read("/proc/self/status")

    def field(name: str) -> int:
        match = re.search(rf"^{name}:\s+(\d+) kB", status, re.MULTILINE)
        return int(match.group(1)) << 10 if match else 0

    return {"peak_rss": field("VmHWM"), "rss_anon": field("RssAnon")}


def canonical(value: object) -> str:
    """JSON with sorted keys, for hashing. Errors: ValueError on NaN, which JSON has no word for."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
