"""Where sluice writes unless it is told otherwise."""

from __future__ import annotations

import os
from pathlib import Path

PACK_SUFFIX = ".sluice.safetensors"


def cache_folder(offload_dir: str | os.PathLike[str] | None = None) -> Path:
    """What sluice converts or spills: `offload_dir`, $SLUICE_CACHE, else ~/.cache/sluice."""
    chosen = offload_dir or os.environ.get("SLUICE_CACHE") or Path.home() / ".cache" / "sluice"
    return Path(chosen).expanduser()


def bench_folder() -> Path:
    """Synthetic checkpoints of benchmarks: $SLUICE_BENCH_DIR, else ~/.cache/sluice/bench."""
    default = Path.home() / ".cache" / "sluice" / "bench"
    return Path(os.environ.get("SLUICE_BENCH_DIR") or default).expanduser()
