"""Writes the experts of a checkpoint plan into a pack, converting those that need it."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch

from sluice import _core
from sluice.errors import CheckpointError, InternalError
from sluice.hf import layout
from sluice.hf.checkpoint.files import load_source
from sluice.hf.checkpoint.plan import CheckpointPlan, SitePlan
from sluice.hf.checkpoint.recipes import Group
from sluice.tensors import TORCH_DTYPES

ReportFn = Callable[[int, int], None]


def write_pack(
    plan: CheckpointPlan,
    path: str | os.PathLike[str],
    options: Any,
    *,
    fingerprint: str,
    model_id: str = "",
    config_sha256: str = "",
    report: ReportFn | None = None,
) -> None:
    """Writes every expert of a plan into a pack; goes on where an earlier run stopped.

    One layer that needs arithmetic is in memory at a time; the others pass through a buffer.
    """
    store = None if plan.needs_ingest else store_in_place(plan, options)
    writer = _core.PackWriter(
        os.fspath(path),
        [layout.layer_geometry(p.site, p.stored) for p in plan.sites],
        model_id=model_id,
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


def store_in_place(plan: CheckpointPlan, options: Any) -> Any:
    """Experts read straight from the shards."""
    builder = layout.empty_builder(options)
    numbers: dict[str, int] = {}
    for site_plan in plan.sites:
        layer = layout.add_layer(builder, site_plan.site, site_plan.stored)
        _add_pieces(builder, layer, plan, site_plan, numbers)
    return builder.build(f"{len(numbers)} shards in place")


def _layer_source(
    plan: CheckpointPlan, site_plan: SitePlan, store: Any, index: int, options: Any
) -> tuple[Any, int, Any]:
    """(store, layer in it, what keeps it alive) of one site's experts."""
    if store is not None:
        return store, index, None
    builder = layout.empty_builder(options)
    layer = layout.add_layer(builder, site_plan.site, site_plan.stored)
    if not site_plan.ingest:
        _add_pieces(builder, layer, plan, site_plan, {})
        return builder.build(), layer, None
    tensors = convert_site(plan, site_plan)
    layout.add_tensors(builder, layer, site_plan.site, tensors)
    return builder.build(), layer, tensors


def _add_pieces(
    builder: Any, layer: int, plan: CheckpointPlan, site_plan: SitePlan, numbers: dict[str, int]
) -> None:
    """Adds a site's byte ranges; `numbers` remembers the files that are open already."""
    for piece in site_plan.pieces():
        if piece.file not in numbers:
            numbers[piece.file] = builder.add_file(piece.file, plan.files[piece.file])
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
    wanted = TORCH_DTYPES[site_plan.stored]
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
        return {group.target: load_source(source, plan.files[source.file]).to(wanted)}
    sources = [
        (source.key, pattern, lambda s=source: load_source(s, plan.files[s.file]).to(wanted))
        for pattern, source in group.all_sources()
    ]
    return plan.conversion.convert(group.target, group.converter, sources)
