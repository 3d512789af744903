"""What sluice has written on this machine: found by its own names, never by "everything here"."""

from __future__ import annotations

import fcntl
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sluice.folders import PACK_SUFFIX, bench_folder, cache_folder

_KINDS = (
    (re.compile(r"^spill-\d+-.*" + re.escape(PACK_SUFFIX) + r"$"), "spilled experts"),
    (re.compile(re.escape(PACK_SUFFIX) + r"$"), "pack of experts"),
    (re.compile(re.escape(PACK_SUFFIX) + r"\.(partial|journal|journal\.new)$"), "unfinished pack"),
    (re.compile(r"^doctor\.json$"), "measured constants"),
    (re.compile(r"^doctor(-|\.).*\.tmp$"), "left over by doctor"),
)
_SPILL_PID = re.compile(r"^spill-(\d+)-")
_BENCH_FOLDER = re.compile(r"^.+-[0-9a-f]{16}$")


@dataclass(frozen=True, slots=True)
class WrittenFile:
    """One file, or one benchmark checkpoint's folder.

    Args:
        path: Where it is.
        kind: What it is, for people.
        num_bytes: Bytes on disk, all files of a folder together.
    """

    path: Path
    kind: str
    num_bytes: int

    def to_dict(self) -> dict[str, Any]:
        """As JSON spells it."""
        return {"path": str(self.path), "kind": self.kind, "bytes": self.num_bytes}


def folders() -> list[Path]:
    """Where sluice writes unless it is told otherwise: its cache and the benchmarks' folder."""
    return [cache_folder(), bench_folder()]


def written_files() -> list[WrittenFile]:
    """Everything of ours in `folders()`; what somebody else put there is not ours to name."""
    cache, bench = folders()
    found: list[WrittenFile] = []
    for path in _entries(cache):
        kind = next((kind for pattern, kind in _KINDS if pattern.search(path.name)), None)
        if kind is not None and path.is_file() and not path.is_symlink():
            found.append(WrittenFile(path, kind, path.stat().st_size))
    for path in _entries(bench):
        ours = _BENCH_FOLDER.match(path.name) and path.is_dir() and not path.is_symlink()
        if ours and (path / "config.json").is_file():
            size = sum(file.lstat().st_size for file in path.rglob("*") if file.is_file())
            found.append(WrittenFile(path, "benchmark checkpoint", size))
    return found


def remove(files: list[WrittenFile]) -> list[WrittenFile]:
    """Removes them but for packs that a living process needs; returns what is gone."""
    removed: list[WrittenFile] = []
    for file in files:
        if file.path.is_dir():
            shutil.rmtree(file.path)
        elif _being_written(file.path) or _spilled_by_the_living(file.path):
            continue
        else:
            file.path.unlink(missing_ok=True)
        removed.append(file)
    return removed


def _entries(folder: Path) -> list[Path]:
    return sorted(folder.iterdir()) if folder.is_dir() else []


def _being_written(path: Path) -> bool:
    """Whether a writer holds its lock; a journal is guarded by the lock of its pack."""
    locked = path.with_suffix(".partial") if path.suffix == ".journal" else path
    if locked.suffix != ".partial" or not locked.exists():
        return False
    with locked.open("rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return True
    return False


def _spilled_by_the_living(path: Path) -> bool:
    """Whether the process that spilled a model's experts here still runs."""
    spill = _SPILL_PID.match(path.name)
    return spill is not None and Path("/proc", spill[1]).exists()
