"""From a CheckpointPlan to a store: a pack that fits, the shards in place, or an ingested pack."""

from __future__ import annotations

import glob
import hashlib
import json
import logging
import os
from pathlib import Path
from typing import Any

from sluice import _core
from sluice.errors import CheckpointError
from sluice.folders import PACK_SUFFIX, cache_folder
from sluice.hf import layout
from sluice.hf.checkpoint.ingest import store_in_place, write_pack
from sluice.hf.checkpoint.plan import CheckpointPlan
from sluice.progress import Progress
from sluice.text import format_bytes

_log = logging.getLogger("sluice")


def open_experts(plan: CheckpointPlan, options: Any) -> Any:
    """The store for a plan, as `options.pack` says.

    "auto" takes a pack beside the checkpoint when it was made from it, else the shards in place;
    "none" looks for no pack; a path must fit. What needs arithmetic is ingested under all three.

    Raises:
        CheckpointError: `pack=PATH` is broken, or was made from another checkpoint.
        IoError: No space for a pack that has to be made.
    """
    if options.pack not in ("auto", "none"):
        store, manifest = open_pack(os.fspath(options.pack), options)
        if why := _misfit(plan, store, manifest, _core.fingerprint_files(list(plan.files))):
            raise CheckpointError(
                f"{options.pack}: {why}; make one from this checkpoint with `sluice pack`, or "
                "leave pack='auto'"
            )
        return store
    folder = glob.escape(os.path.dirname(next(iter(plan.files))))
    found = glob.glob(os.path.join(folder, f"*{PACK_SUFFIX}")) if options.pack == "auto" else []
    if found or plan.needs_ingest:
        fingerprint = _core.fingerprint_files(list(plan.files))
        ingested = ingest_path(plan, fingerprint, options.offload_dir)
        for path in [*sorted(found), str(ingested)]:
            if os.path.exists(path):
                store, manifest = open_pack(path, options)
                if not (why := _misfit(plan, store, manifest, fingerprint)):
                    return store
                _log.info("%s is left aside: %s", path, why)
        if plan.needs_ingest:
            return _ingest(plan, fingerprint, ingested, options)
    return store_in_place(plan, options)


def ingest_path(plan: CheckpointPlan, fingerprint: str, offload_dir: Any) -> Path:
    """Where the pack of this checkpoint, converted in this way, lives in the cache."""
    recipe = [
        [p.site.name, p.stored, [[s, str(g.chain)] for s, g in p.groups.items()]]
        for p in plan.sites
    ]
    key = hashlib.sha256((fingerprint + json.dumps(recipe)).encode()).hexdigest()[:24]
    name = os.path.basename(os.path.dirname(os.path.abspath(next(iter(plan.files)))))
    return cache_folder(offload_dir) / f"{name}-{key}{PACK_SUFFIX}"


def open_pack(path: str, options: Any) -> tuple[Any, dict[str, Any]]:
    """(store, manifest) of a pack, read as the options say."""
    return _core.open_pack(
        path,
        chunk_bytes=options.chunk_bytes_as_int(),
        verify=options.verify,
        direct=options.direct,
    )


def _misfit(plan: CheckpointPlan, store: Any, manifest: dict[str, Any], fingerprint: str) -> str:
    """Why a pack is not this plan's; "" when it is."""
    held = manifest["source_fingerprint"]
    if held != fingerprint:
        return (
            f"got a pack of another checkpoint (fingerprint {held[:12]}), expected "
            f"{fingerprint[:12]}"
        )
    if store.num_layers != len(plan.sites):
        return f"got {store.num_layers} layers, expected {len(plan.sites)}"
    for index, site_plan in enumerate(plan.sites):
        layer = store.layer(index)
        for name, expected in layout.layer_geometry(site_plan.site, site_plan.stored).items():
            if layer[name] != expected:
                return f"{site_plan.site.name}: got {name} {layer[name]}, expected {expected}"
    return ""


def _ingest(plan: CheckpointPlan, fingerprint: str, path: Path, options: Any) -> Any:
    size = sum(p.site.num_experts * layout.expert_bytes(p.site, p.stored) for p in plan.sites)
    _log.warning(
        "converting experts once, %s into %s (%s)", format_bytes(size), path, plan.needs_ingest
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    with Progress("converting experts", unit="experts") as bar:
        write_pack(plan, path, options, fingerprint=fingerprint, report=bar)
    store, _ = open_pack(str(path), options)
    return store
