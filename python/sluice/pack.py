"""A checkpoint's experts in one file that is quick to read: aligned, checked, one read each."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from sluice import _core
from sluice.config import OffloadOptions
from sluice.folders import PACK_SUFFIX


def make_pack(
    checkpoint_dir: str | os.PathLike[str],
    out: str | os.PathLike[str] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Path:
    """Writes the pack of a checkpoint; a run that was stopped goes on where it was.

    Args:
        checkpoint_dir: A folder with config.json and safetensors.
        out: The pack; `<checkpoint_dir>/experts.sluice.safetensors` unless given. There, loading
            with `pack="auto"` finds it.
        progress: Called with experts done and all.

    Returns:
        Where it is.

    Raises:
        CheckpointError: The checkpoint misses an expert or lies about one.
        IoError: No space, a failing disk, or another process that writes the same pack.
    """
    from sluice.hf import describe
    from sluice.hf.checkpoint.files import shard_files
    from sluice.hf.checkpoint.ingest import write_pack
    from sluice.hf.checkpoint.plan import plan_checkpoint
    from sluice.hf.detect import find_expert_sites

    folder = Path(checkpoint_dir)
    path = Path(out) if out is not None else folder / f"experts{PACK_SUFFIX}"
    files = shard_files(folder)
    model = describe.build_on_meta(folder)
    plan = plan_checkpoint(model, find_expert_sites(model), files)
    write_pack(
        plan,
        path,
        OffloadOptions(device_memory="100%"),
        fingerprint=_core.fingerprint_files(files),
        model_id=str(getattr(model.config, "_name_or_path", "") or folder.resolve().name),
        config_sha256=describe.config_sha256(folder),
        report=progress,
    )
    return path


def verify(
    pack: str | os.PathLike[str], progress: Callable[[int, int], None] | None = None
) -> None:
    """Reads a whole pack and compares every checksum.

    Args:
        pack: Its path.
        progress: Called with bytes done and all.

    Raises:
        CheckpointError: The first lie: a header, a size, or an expert whose bytes changed.
    """
    _core.verify_pack(os.fspath(pack), progress)
