"""How much RAM there is for this process, as the kernel tells it."""

from __future__ import annotations

from pathlib import Path

_NO_LIMIT = 1 << 60  # cgroup v1 writes "no limit" as a number beyond this


def available_bytes() -> int:
    """What can still be allocated: free and reclaimable RAM, or what the control group leaves."""
    available = meminfo().get("MemAvailable", _NO_LIMIT)
    limit = cgroup_limit()
    return available if limit is None else max(0, min(available, limit - _own_bytes()))


def cgroup_limit(
    membership: Path = Path("/proc/self/cgroup"), root: Path = Path("/sys/fs/cgroup")
) -> int | None:
    """The least memory limit on the way from this process's control group to the root.

    Both versions are understood; the arguments are for tests.
    """
    limits: list[int] = []
    for line in read_text(membership).splitlines():
        _, controllers, path = [*line.split(":", 2), "", ""][:3]
        if controllers == "":
            top, name = root, "memory.max"
        elif "memory" in controllers.split(","):
            top, name = root / "memory", "memory.limit_in_bytes"
        else:
            continue
        group = top / path.lstrip("/")
        for folder in (group, *group.parents):
            text = read_text(folder / name).strip()
            if text.isdigit() and int(text) < _NO_LIMIT:
                limits.append(int(text))
            if folder == top:
                break
    return min(limits, default=None)


def meminfo() -> dict[str, int]:
    """/proc/meminfo in bytes."""
    return _kilobytes(Path("/proc/meminfo"))


def read_text(path: Path) -> str:
    """The file's text; empty where the kernel has no such file."""
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _own_bytes() -> int:
    return _kilobytes(Path("/proc/self/status")).get("RssAnon", 0)


def _kilobytes(path: Path) -> dict[str, int]:
    found: dict[str, int] = {}
    for line in read_text(path).splitlines():
        name, _, rest = line.partition(":")
        words = rest.split()
        if len(words) == 2 and words[1] == "kB":
            found[name] = int(words[0]) * 1024
    return found
