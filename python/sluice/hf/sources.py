"""From a CheckpointPlan to a store: a pack that fits, the shards in place, or an ingested pack."""

from __future__ import annotations

import glob
import hashlib
import json
import logging
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from sluice import _core
from sluice.errors import CheckpointError, InternalError
from sluice.hf import layout
from sluice.hf.detect import ExpertSite
from sluice.hf.plan import CheckpointPlan, Group, SitePlan, Source
from sluice.progress import Progress, format_bytes

PACK_SUFFIX = ".sluice.safetensors"
_log = logging.getLogger("sluice")
_SOURCE_DTYPES = {
    **{n: layout.torch_dtype(n) for n in ("F32", "BF16", "F16")},
    "F64": torch.float64,
}

ReportFn = Callable[[int, int], None]


def open_experts(plan: CheckpointPlan, options: Any) -> Any:
    """The store for a plan, as `options.pack` says.

    "auto" takes a pack beside the checkpoint when it was made from it, else the shards in place;
    "none" looks for no pack; a path must fit. What needs arithmetic is ingested under all three.

    Raises:
        CheckpointError: `pack=PATH` is broken, or was made from another checkpoint.
        IoError: No space for a pack that has to be made.
    """
    if options.pack not in ("auto", "none"):
        store, manifest = _open_pack(os.fspath(options.pack), options)
        if why := _misfit(plan, store, manifest, _core.fingerprint_files(plan.files)):
            raise CheckpointError(
                f"{options.pack}: {why}; make one from this checkpoint with `sluice pack`, or "
                "leave pack='auto'"
            )
        return store
    folder = glob.escape(os.path.dirname(plan.files[0]))
    found = glob.glob(os.path.join(folder, f"*{PACK_SUFFIX}")) if options.pack == "auto" else []
    if found or plan.needs_ingest:
        fingerprint = _core.fingerprint_files(plan.files)
        ingested = ingest_path(plan, fingerprint, options.offload_dir)
        for path in [*sorted(found), str(ingested)]:
            if os.path.exists(path):
                store, manifest = _open_pack(path, options)
                if not (why := _misfit(plan, store, manifest, fingerprint)):
                    return store
                _log.info("%s is left aside: %s", path, why)
        if plan.needs_ingest:
            return _ingest(plan, fingerprint, ingested, options)
    return store_in_place(plan, options)


def store_in_place(plan: CheckpointPlan, options: Any) -> Any:
    """Experts read straight from the shards."""
    builder = layout.empty_builder(options)
    numbers: dict[str, int] = {}
    for site_plan in plan.sites:
        layer = layout.add_layer(builder, site_plan.site, site_plan.stored)
        _add_pieces(builder, layer, site_plan, numbers)
    return builder.build(f"{len(numbers)} shards in place")


def write_pack(
    plan: CheckpointPlan,
    path: str | os.PathLike[str],
    options: Any,
    *,
    fingerprint: str,
    model_id: str = "",
    revision: str = "",
    config_sha256: str = "",
    report: ReportFn | None = None,
) -> None:
    """Writes every expert of a plan into a pack; goes on where an earlier run stopped.

    One layer that needs arithmetic is in memory at a time; the others pass through a buffer.
    """
    store = None if plan.needs_ingest else store_in_place(plan, options)
    writer = _core.PackWriter(
        os.fspath(path),
        [layer_geometry(p.site, p.stored) for p in plan.sites],
        model_id=model_id,
        revision=revision,
        config_sha256=config_sha256,
        source_fingerprint=fingerprint,
    )
    try:
        begin, total = writer.resumed_experts, writer.num_experts
        done = 0
        for index, site_plan in enumerate(plan.sites):
            experts = site_plan.site.num_experts
            first = max(begin - done, 0)
            if first < experts:
                source, layer, keep = _layer_source(plan, site_plan, store, index, options)
                for expert in range(first, experts):
                    writer.append_from(source, layer, expert)
                    if report is not None:
                        report(done + expert + 1, total)
                del source, keep
            done += experts
        writer.finish()
    finally:
        writer.close()


def layer_geometry(site: ExpertSite, stored: str) -> dict[str, Any]:
    """A layer as the pack's manifest describes it."""
    return {
        "name": site.name,
        "num_experts": site.num_experts,
        "dtype": stored,
        "hidden": site.hidden,
        "intermediate": site.intermediate,
        "gated": site.gated,
        "has_bias": site.has_bias,
    }


def ingest_path(plan: CheckpointPlan, fingerprint: str, offload_dir: Any) -> Path:
    """Where the pack of this checkpoint, converted in this way, lives in the cache."""
    recipe = [
        [p.site.name, p.stored, [[s, str(g.chain)] for s, g in p.groups.items()]]
        for p in plan.sites
    ]
    key = hashlib.sha256((fingerprint + json.dumps(recipe)).encode()).hexdigest()[:24]
    name = os.path.basename(os.path.dirname(os.path.abspath(plan.files[0])))
    return cache_folder(offload_dir) / f"{name}-{key}{PACK_SUFFIX}"


def cache_folder(offload_dir: Any = None) -> Path:
    """The one place for what sluice writes: `offload_dir`, $SLUICE_CACHE, else ~/.cache/sluice."""
    chosen = offload_dir or os.environ.get("SLUICE_CACHE") or Path.home() / ".cache" / "sluice"
    return Path(chosen).expanduser()


def _open_pack(path: str, options: Any) -> tuple[Any, dict[str, Any]]:
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
        for name, expected in layer_geometry(site_plan.site, site_plan.stored).items():
            if layer[name] != expected:
                return f"{site_plan.site.name}: got {name} {layer[name]}, expected {expected}"
    return ""


def _ingest(plan: CheckpointPlan, fingerprint: str, path: Path, options: Any) -> Any:
    size = sum(p.site.num_experts * _expert_bytes(p) for p in plan.sites)
    _log.warning(
        "converting experts once, %s into %s (%s)", format_bytes(size), path, plan.needs_ingest
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    with Progress("converting experts", unit="experts") as bar:
        write_pack(plan, path, options, fingerprint=fingerprint, report=bar)
    store, _ = _open_pack(str(path), options)
    return store


def _expert_bytes(site_plan: SitePlan) -> int:
    offset, nbytes = list(layout.section_ranges(site_plan.site, site_plan.stored).values())[-1]
    return offset + nbytes


def _layer_source(
    plan: CheckpointPlan, site_plan: SitePlan, store: Any, index: int, options: Any
) -> tuple[Any, int, Any]:
    """(store, layer in it, what keeps it alive) of one site's experts."""
    if store is not None:
        return store, index, None
    builder = layout.empty_builder(options)
    layer = layout.add_layer(builder, site_plan.site, site_plan.stored)
    if not site_plan.ingest:
        _add_pieces(builder, layer, site_plan, {})
        return builder.build(), layer, None
    tensors = convert_site(plan, site_plan)
    layout.add_tensors(builder, layer, site_plan.site, tensors)
    return builder.build(), layer, tensors


def _add_pieces(builder: Any, layer: int, site_plan: SitePlan, numbers: dict[str, int]) -> None:
    """Adds a site's byte ranges; `numbers` remembers the files that are open already."""
    for piece in site_plan.pieces():
        if piece.file not in numbers:
            numbers[piece.file] = builder.add_file(piece.file)
        builder.add_piece(
            layer,
            piece.expert,
            piece.section,
            file=numbers[piece.file],
            offset=piece.offset,
            nbytes=piece.nbytes,
            section_offset=piece.section_offset,
            transform=piece.transform,
            rows=piece.rows,
            columns=piece.columns,
            dtype=piece.dtype,
        )


def convert_site(plan: CheckpointPlan, site_plan: SitePlan) -> dict[str, torch.Tensor]:
    """A site's whole tensors through transformers' own converters, on the CPU, in its type."""
    wanted = layout.torch_dtype(site_plan.stored)
    site = site_plan.site
    tensors: dict[str, torch.Tensor] = {}
    made: dict[str, Any] = {}
    for section, parameter in site.parameters.items():
        group, target = site_plan.groups[section], f"{site.name}.{parameter}"
        if target not in made:
            made |= _run(plan, group, wanted)
        if target not in made:
            raise InternalError(f"{target}: transformers' converter made {', '.join(made)} instead")
        shape = tuple(getattr(site.module, parameter).shape)
        if tuple(made[target].shape) != shape:
            raise CheckpointError(
                f"{target}: got {list(made[target].shape)} from the checkpoint, expected "
                f"{list(shape)}; the config and the checkpoint disagree"
            )
        tensors[section] = made.pop(target).to(wanted).contiguous()
    return tensors


def _run(plan: CheckpointPlan, group: Group, wanted: torch.dtype) -> dict[str, Any]:
    if group.converter is None:
        (_, source), *_ = group.all_sources()
        return {group.target: load_source(source).to(wanted)}
    sources = [
        (source.key, pattern, lambda s=source: load_source(s).to(wanted))
        for pattern, source in group.all_sources()
    ]
    return plan.conversion.convert(group.target, group.converter, sources)


def load_source(source: Source) -> torch.Tensor:
    """One tensor of a shard, read whole."""
    memory = bytearray(source.nbytes)
    with open(source.file, "rb", buffering=0) as file:
        file.seek(source.offset)
        view = memoryview(memory)
        while view.nbytes:
            count = file.readinto(view)
            if not count:
                raise CheckpointError(
                    f"{source.file}: got the end of the file inside {source.key}, expected "
                    f"{view.nbytes} more bytes; download the shard again"
                )
            view = view[count:]
    return torch.frombuffer(memory, dtype=_SOURCE_DTYPES[source.dtype]).view(source.shape)


def shard_files(folder: str | os.PathLike[str]) -> list[str]:
    """The safetensors shards of a checkpoint folder, as transformers would choose them.

    Raises:
        CheckpointError: No weights, `.bin` only, or a shard that the index names is missing.
    """
    root = Path(folder)
    index, single = root / "model.safetensors.index.json", root / "model.safetensors"
    if single.exists():
        return [str(single)]
    if index.exists():
        names = sorted(set(_weight_map(index)))
        for name in names:
            if not (root / name).exists():
                raise CheckpointError(
                    f"{root / name}: got no such file, expected the shard that {index.name} names; "
                    "download it again"
                )
        return [str(root / name) for name in names]
    if any(root.glob("*.bin")):
        raise CheckpointError(
            f"{root}: got .bin weights only, expected safetensors; convert them once: "
            "model.save_pretrained(folder)"
        )
    raise CheckpointError(
        f"{root}: got no model.safetensors and no {index.name}, expected a checkpoint folder"
    )


def _weight_map(index: Path) -> Iterator[str]:
    try:
        yield from json.loads(index.read_text())["weight_map"].values()
    except (ValueError, KeyError, AttributeError) as error:
        raise CheckpointError(
            f"{index}: got no weight_map in it ({error}), expected an index; download it again"
        ) from error
