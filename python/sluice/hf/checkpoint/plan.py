"""CheckpointPlan: where every expert's bytes lie in a checkpoint, by transformers' own mapping.

Headers alone are read. Each checkpoint key is renamed as transformers would rename it; what lands
on a site's parameter becomes, by the converter's chain of operations, either byte ranges per expert
(copied, joined, transposed or widened on their way into a slot) or, when the chain computes
something or the type gets narrower, a site that must be ingested into a pack first.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from sluice import _core
from sluice.errors import CheckpointError, UnsupportedModelError
from sluice.hf import compat
from sluice.hf.checkpoint.recipes import (
    Group,
    Piece,
    Source,
    check_shapes,
    pieces_of,
    why_it_computes,
)
from sluice.hf.site import ExpertSite, dtype_name

_FLOATS = ("F64", "F32", "BF16", "F16")


@dataclass(frozen=True, slots=True)
class SitePlan:
    """One site: its groups by section, its stored type, and why it cannot be read in place."""

    site: ExpertSite
    groups: dict[str, Group]
    stored: str  # "F32" | "BF16" | "F16": the type of the experts' matrices in the store
    ingest: str  # "" when byte ranges suffice, else the reason

    def pieces(self) -> Iterator[Piece]:
        """Byte ranges of all experts; only for sites that need no ingest."""
        for section, group in self.groups.items():
            yield from pieces_of(self.site, section, group)


@dataclass(frozen=True, slots=True)
class CheckpointPlan:
    """All sites of a model over one checkpoint."""

    files: dict[str, str]  # path → identity when its header was read
    sites: tuple[SitePlan, ...]
    conversion: compat.Conversion

    @property
    def needs_ingest(self) -> str:
        """The first reason why experts cannot be read where they lie; "" when they can."""
        return next((f"{p.site.name}: {p.ingest}" for p in self.sites if p.ingest), "")


def plan_checkpoint(
    model: Any, sites: Sequence[ExpertSite], files: Sequence[str]
) -> CheckpointPlan:
    """Reads the headers of `files` and places every expert of every site.

    Args:
        model: On meta, still with the original experts; parameters have their final types.
        sites: Of `find_expert_sites(model)`.
        files: Safetensors shards; `.bin` files are refused.

    Raises:
        CheckpointError: A shard lies, or an expert is missing, doubled or of another shape.
        UnsupportedModelError: Experts are stored in a type that is no plain float.
    """
    _refuse_pickles(files)
    conversion = compat.Conversion(model)
    wanted = {
        f"{site.name}.{parameter}": (site, section)
        for site in sites
        for section, parameter in site.parameters.items()
    }
    headers = {file: _core.read_safetensors_header(file) for file in files}
    groups = _collect(conversion, wanted, headers)
    overrides = compat.dtype_overrides(model, sites[0].dtype) if sites else {}
    plans = tuple(_plan_site(site, groups, overrides) for site in sites)
    identities = {file: header["identity"] for file, header in headers.items()}
    return CheckpointPlan(identities, plans, conversion)


def _refuse_pickles(files: Sequence[str]) -> None:
    for path in files:
        if not path.endswith(".safetensors"):
            raise CheckpointError(
                f"{path}: got a checkpoint that is no safetensors file and would have to be "
                "read whole; convert it once: model.save_pretrained(folder) writes safetensors"
            )


def _collect(
    conversion: compat.Conversion, wanted: dict[str, Any], headers: dict[str, dict[str, Any]]
) -> dict[str, Group]:
    """Every wanted parameter's group; keys that land elsewhere are transformers' business."""
    groups: dict[str, Group] = {}
    seen: dict[str, str] = {}
    for file, header in headers.items():
        for name, dtype, shape, offset, nbytes in header["tensors"]:
            target, pattern = conversion.target_of(name)
            converter = None if pattern is None else conversion.converter_of(pattern)
            names = _targets(target, converter)
            if not any(alias in wanted for alias in names):
                continue
            if name in seen:
                raise CheckpointError(
                    f"{name}: got two tensors of this name, in {seen[name]} and {file}, expected "
                    "one; remove the stale shard"
                )
            seen[name] = file
            group = groups.get(target)
            if group is None:
                group = Group(target, converter)
                groups.update(dict.fromkeys([alias for alias in names if alias in wanted], group))
                groups[target] = group
            source = Source(name, file, dtype, tuple(shape), offset, nbytes)
            _add(group, conversion, pattern, source)
    return groups


def _targets(target: str, converter: Any) -> list[str]:
    """A converter may make several parameters; the key is renamed to the first one's name."""
    if converter is None:
        return [target]
    first, *others = converter.target_patterns
    return [target, *(target.replace(first, other) for other in others)]


def _add(group: Group, conversion: compat.Conversion, pattern: str | None, source: Source) -> None:
    index = None if pattern is None else conversion.index_of(source.key, pattern)
    held = group.sources.setdefault(pattern or source.key, {})
    if (
        index in held
        or (pattern is None) != (group.converter is None)
        or (pattern is None and len(group.sources) > 1)
    ):
        other = next(iter(group.all_sources()))[1] if index not in held else held[index]
        raise CheckpointError(
            f"{group.target}: got {source.key} and {other.key} for one place, expected one; the "
            "checkpoint holds the same experts twice"
        )
    held[index] = source


def _plan_site(
    site: ExpertSite, groups: dict[str, Group], overrides: dict[str, torch.dtype]
) -> SitePlan:
    mine: dict[str, Group] = {}
    for section, parameter in site.parameters.items():
        target = f"{site.name}.{parameter}"
        if target not in groups:
            raise CheckpointError(
                f"{target}: got no tensor of the checkpoint for it, expected {site.num_experts} "
                "experts; is a shard missing, or is this another model's checkpoint? (sluice does "
                "not see key_mapping=: rename the keys once, with save_pretrained)"
            )
        mine[section] = groups[target]
    wanted = _wanted_dtype(site, overrides)
    _refuse_quantised(site, mine)
    reason = next((why for s, g in mine.items() if (why := why_it_computes(site, s, g))), "")
    if not reason:
        for section, group in mine.items():
            check_shapes(site, section, group)
        reason = _narrows(mine, wanted)
    return SitePlan(site, mine, wanted if reason else _matrix_types(mine).pop(), reason)


def _wanted_dtype(site: ExpertSite, overrides: dict[str, torch.dtype]) -> str:
    for pattern, dtype in overrides.items():
        if re.search(pattern.replace("*", ".*"), f"{site.name}.down_proj"):
            return dtype_name(dtype)
    return dtype_name(site.dtype)


def _refuse_quantised(site: ExpertSite, groups: dict[str, Group]) -> None:
    for group in groups.values():
        for _, source in group.all_sources():
            if source.dtype not in _FLOATS:
                raise UnsupportedModelError(
                    f"{source.key}: got {source.dtype} experts for {site.label}, expected one of "
                    f"{', '.join(_FLOATS)}; quantised checkpoints are not supported yet"
                )


def _types(group: Group) -> set[str]:
    return {source.dtype for _, source in group.all_sources()}


def _matrix_types(groups: dict[str, Group]) -> set[str]:
    return _types(groups["w13"]) | _types(groups["w2"])


def _narrows(groups: dict[str, Group], wanted: str) -> str:
    """Why the stored types cannot be kept: "" for the wanted type, or fp32 over one half type."""
    matrices = _matrix_types(groups)
    if len(matrices) > 1:
        return f"its matrices have several types, {', '.join(sorted(matrices))}"
    for kind in matrices.union(*(_types(group) for group in groups.values())):
        if kind != wanted and not (wanted == "F32" and kind in ("BF16", "F16")):
            return f"{kind} is converted to {wanted}"
    return ""
