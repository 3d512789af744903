"""What transformers' loader would collect for a parameter, and how that becomes byte ranges.

A chain of operations that only stacks, joins or transposes is a recipe: per expert a few ranges of
files. Everything else is named, so that the plan can say why a checkpoint has to be converted.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from sluice.errors import CheckpointError
from sluice.hf import compat
from sluice.hf.site import ExpertSite

_WIDTH = {"F64": 8, "F32": 4, "BF16": 2, "F16": 2}


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


def shape_of(site: ExpertSite, section: str) -> tuple[int, int]:
    """(rows, columns) of one expert's section in canonical order; vectors have one row."""
    return {
        "w13": (site.w13_rows, site.hidden),
        "w2": (site.hidden, site.intermediate),
        "b13": (1, site.w13_rows),
        "b2": (1, site.hidden),
    }[section]


def natural_shape(site: ExpertSite, section: str) -> tuple[int, ...]:
    """Shape of one expert's section in the module's parameter."""
    rows, columns = shape_of(site, section)
    if section[0] == "b":
        return (columns,)
    return (columns, rows) if site.transposed else (rows, columns)


def why_it_computes(site: ExpertSite, section: str, group: Group) -> str:
    """Why a group's chain is more than byte ranges; "" when it is not."""
    match group.chain:
        case []:
            return ""
        case [("MergeModulelist", {"dim": 0, **rest})] if not rest:
            return "" if len(group.sources) == 1 else "several sources are merged"
        case [("MergeModulelist", {"dim": 0, **rest}), ("Concatenate", {"dim": 1, **more})] if (
            not rest and more.get("num_shards_attribute") is None and len(more) <= 1
        ):
            if section not in ("w13", "w2"):
                return "its biases are joined"
            return "its transposed matrices are joined by columns" if site.transposed else ""
        case [("Transpose", {"dim0": 1, "dim1": 2, "check_dims": _, **rest})] if not rest:
            return "" if section in ("w13", "w2") else "its biases are transposed"
        case chain:
            return "the checkpoint needs " + ", ".join(name for name, _ in chain)


def check_shapes(site: ExpertSite, section: str, group: Group) -> None:
    """Each tensor has the shape that its chain and the parameter ask for; experts are complete."""
    rows, columns = shape_of(site, section)
    one = natural_shape(site, section)
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


def pieces_of(site: ExpertSite, section: str, group: Group) -> Iterator[Piece]:
    """The byte ranges of one section of all experts; `why_it_computes` must say nothing."""
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
    natural = (site.num_experts, *natural_shape(site, section))
    flips = _flips(group)
    flipped = flips is True or (flips is False and source.shape != natural)
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
    nbytes = rows * columns * _WIDTH[source.dtype]
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
