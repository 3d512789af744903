"""CheckpointPlan: where every expert's bytes lie in a checkpoint, by transformers' own mapping.

Headers alone are read. Each checkpoint key is renamed as transformers would rename it; what lands
on a site's parameter becomes, by the converter's chain of operations, either byte ranges per expert
(copied, joined, transposed or widened on their way into a slot) or, when the chain computes
something or the type gets narrower, a site that must be ingested into a pack first.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from sluice import _core
from sluice.errors import CheckpointError, UnsupportedModelError
from sluice.hf import compat
from sluice.hf.detect import ExpertSite, dtype_name

_WIDTH = {"F32": 4, "BF16": 2, "F16": 2}
_FLOATS = ("F64", "F32", "BF16", "F16")


@dataclass(frozen=True, slots=True)
class Source:
    """One tensor of a shard, as its header describes it."""

    key: str
    file: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class Piece:
    """One byte range of an expert; the arguments of `StoreBuilder.add_piece`."""

    expert: int
    section: str
    file: str
    offset: int
    nbytes: int
    section_offset: int = 0
    transform: str = "copy"
    rows: int = 0
    columns: int = 0
    dtype: str = "F32"


@dataclass(slots=True)
class Group:
    """Everything that transformers' loader collects for one parameter (or a set of them)."""

    target: str
    converter: Any = None  # None: the key is only renamed
    sources: dict[str, dict[int | None, Source]] = field(default_factory=dict)

    def all_sources(self) -> Iterator[tuple[str, Source]]:
        """(pattern, source) of every tensor, in the order of experts."""
        for pattern, indexed in self.sources.items():
            for index in sorted(indexed, key=lambda i: -1 if i is None else i):
                yield pattern, indexed[index]

    @property
    def chain(self) -> list[tuple[str, dict[str, Any]]]:
        """The converter's operations; empty for a renaming."""
        return [] if self.converter is None else compat.operation_names(self.converter)


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
            yield from _pieces(self.site, section, group)


@dataclass(frozen=True, slots=True)
class CheckpointPlan:
    """All sites of a model over one checkpoint."""

    files: tuple[str, ...]
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
    groups = _collect(conversion, wanted, files)
    overrides = compat.dtype_overrides(model, sites[0].dtype) if sites else {}
    plans = tuple(_plan_site(site, groups, overrides) for site in sites)
    return CheckpointPlan(tuple(files), plans, conversion)


def shape_of(site: ExpertSite, section: str) -> tuple[int, int]:
    """(rows, columns) of one expert's section in canonical order; vectors have one row."""
    return {
        "w13": (site.w13_rows, site.hidden),
        "w2": (site.hidden, site.intermediate),
        "b13": (1, site.w13_rows),
        "b2": (1, site.hidden),
    }[section]


def _refuse_pickles(files: Sequence[str]) -> None:
    for path in files:
        if not path.endswith(".safetensors"):
            raise CheckpointError(
                f"{path}: got a checkpoint that is no safetensors file and would have to be "
                "read whole; convert it once: model.save_pretrained(folder) writes safetensors"
            )


def _collect(
    conversion: compat.Conversion, wanted: dict[str, Any], files: Sequence[str]
) -> dict[str, Group]:
    """Every wanted parameter's group; keys that land elsewhere are transformers' business."""
    groups: dict[str, Group] = {}
    seen: dict[str, str] = {}
    for file in files:
        for name, dtype, shape, offset, nbytes in _core.read_safetensors_header(file)["tensors"]:
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
                "experts; is a shard missing, or is this another model's checkpoint?"
            )
        mine[section] = groups[target]
    wanted = _wanted_dtype(site, overrides)
    _refuse_quantised(site, mine)
    reason = next((why for s, g in mine.items() if (why := _computes(site, s, g))), "")
    if not reason:
        for section, group in mine.items():
            _check_shapes(site, section, group)
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


def _computes(site: ExpertSite, section: str, group: Group) -> str:
    """Why a group's chain is more than byte ranges; "" when it is not."""
    match group.chain:
        case []:
            return ""
        case [("MergeModulelist", {"dim": 0, **rest})] if not rest:
            return "" if len(group.sources) == 1 else "several sources are merged"
        case [("MergeModulelist", {"dim": 0, **rest}), ("Concatenate", {"dim": 1, **more})] if (
            not rest and more.get("num_shards_attribute") is None and len(more) <= 1
        ):
            return "" if not site.transposed else "its transposed matrices are joined by columns"
        case [("Transpose", {"dim0": 1, "dim1": 2, "check_dims": _, **rest})] if not rest:
            return "" if section in ("w13", "w2") else "its biases are transposed"
        case chain:
            return "the checkpoint needs " + ", ".join(name for name, _ in chain)


def _check_shapes(site: ExpertSite, section: str, group: Group) -> None:
    """Each tensor has the shape that its chain and the parameter ask for; experts are complete."""
    rows, columns = shape_of(site, section)
    vector = section in ("b13", "b2")
    one = (columns,) if vector else ((columns, rows) if site.transposed else (rows, columns))
    if not any(name == "MergeModulelist" for name, _ in group.chain):
        source = next(iter(group.all_sources()))[1]
        allowed = {(site.num_experts, *one)}
        allowed |= {(site.num_experts, *reversed(one))} if _flips(group) is not None else set()
        if _flips(group) is True:
            allowed = {(site.num_experts, *reversed(one))}
        if source.shape not in allowed:
            raise _wrong_shape(source, site, min(allowed))
        return
    patterns = _patterns(group)
    for pattern in patterns:
        indexed = group.sources.get(pattern, {})
        for expert in range(site.num_experts):
            if expert not in indexed:
                raise CheckpointError(
                    f"{site.name}: expert {expert} has no tensor like {pattern}, expected "
                    f"{site.num_experts} of them; is a shard missing?"
                )
        extra = [i for i in indexed if i is None or not 0 <= i < site.num_experts]
        if extra:
            raise CheckpointError(
                f"{site.name}: got expert {extra[0]} ({indexed[extra[0]].key}), expected "
                f"0 … {site.num_experts - 1}; the config and the checkpoint disagree"
            )
    for expert in range(site.num_experts):
        parts = [group.sources[pattern][expert] for pattern in patterns]
        if len(parts) == 1:
            if parts[0].shape != one:
                raise _wrong_shape(parts[0], site, one)
            continue
        for part in parts:
            if part.shape != (rows // len(parts), columns):
                raise _wrong_shape(part, site, (rows // len(parts), columns))


def _wrong_shape(source: Source, site: ExpertSite, expected: tuple[int, ...]) -> CheckpointError:
    return CheckpointError(
        f"{source.key}: got shape {list(source.shape)}, expected {list(expected)} for "
        f"{site.label}; the config and the checkpoint disagree"
    )


def _patterns(group: Group) -> list[str]:
    """Source patterns in the order in which the chain joins them."""
    return list(group.sources) if group.converter is None else list(group.converter.source_patterns)


def _flips(group: Group) -> bool | None:
    """True: the chain transposes; None: it does not; False: only when the shapes differ."""
    match group.chain:
        case [("Transpose", attributes)]:
            return not attributes["check_dims"]
        case _:
            return None


def _pieces(site: ExpertSite, section: str, group: Group) -> Iterator[Piece]:
    rows, columns = shape_of(site, section)
    if any(name == "MergeModulelist" for name, _ in group.chain):
        for expert in range(site.num_experts):
            filled = 0
            for pattern in _patterns(group):
                source = group.sources[pattern][expert]
                share = rows // len(_patterns(group))
                start = (source.offset, filled)
                yield _piece(site, section, expert, source, start, (share, columns), flipped=False)
                filled += share * columns * (_WIDTH[source.dtype] if section[0] == "w" else 4)
        return
    source = next(iter(group.all_sources()))[1]
    one = (columns, rows) if site.transposed else (rows, columns)
    flips = _flips(group)
    flipped = flips is True or (flips is False and source.shape != (site.num_experts, *one))
    stride = source.nbytes // site.num_experts
    for expert in range(site.num_experts):
        start = (source.offset + expert * stride, 0)
        yield _piece(site, section, expert, source, start, (rows, columns), flipped=flipped)


def _piece(  # noqa: PLR0917
    site: ExpertSite,
    section: str,
    expert: int,
    source: Source,
    start: tuple[int, int],
    shape: tuple[int, int],
    *,
    flipped: bool,
) -> Piece:
    """One section, or a part of it, of canonical `shape`; `start` is (source, target) offset."""
    rows, columns = shape
    nbytes = rows * columns * _WIDTH.get(source.dtype, 8)
    if section[0] == "b":
        transform = "copy" if source.dtype == "F32" else "widen"
    else:
        transform = "transpose" if site.transposed != flipped else "copy"
    turned = transform == "transpose"
    return Piece(
        expert=expert,
        section=section,
        file=source.file,
        offset=start[0],
        nbytes=nbytes,
        section_offset=start[1],
        transform=transform,
        rows=columns if turned else rows,
        columns=rows if turned else columns,
        dtype=source.dtype,
    )
