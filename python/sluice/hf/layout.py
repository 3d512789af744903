"""Experts' tensors ↔ the canonical bytes of a slot.

The order of `csrc/base/expert_layout.h`: `w13 | w2 | b13 | b2`, each on a multiple of 64 bytes,
biases in fp32. Going in, the store does the work from byte ranges; coming out (restore, parity)
this file undoes it bit for bit.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch

from sluice import _core
from sluice.errors import InternalError
from sluice.hf.checkpoint.recipes import natural_shape, shape_of
from sluice.hf.site import ExpertSite, dtype_name
from sluice.tensors import TORCH_DTYPES

SLOT_ALIGNMENT = 64


def section_ranges(site: ExpertSite, stored: str) -> dict[str, tuple[int, int]]:
    """Section → (offset, bytes) in an expert's canonical bytes."""
    ranges: dict[str, tuple[int, int]] = {}
    end = 0
    for section in site.parameters:
        begin = -(-end // SLOT_ALIGNMENT) * SLOT_ALIGNMENT
        width = 4 if section[0] == "b" else TORCH_DTYPES[stored].itemsize
        nbytes = math.prod(shape_of(site, section)) * width
        ranges[section] = (begin, nbytes)
        end = begin + nbytes
    return ranges


def expert_bytes(site: ExpertSite, stored: str) -> int:
    """One expert's canonical bytes, without padding behind its last section."""
    return sum(list(section_ranges(site, stored).values())[-1])


def slot_bytes(site: ExpertSite, stored: str) -> int:
    """The same as a slot holds it, padded."""
    return -(-expert_bytes(site, stored) // SLOT_ALIGNMENT) * SLOT_ALIGNMENT


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


def add_layer(builder: Any, site: ExpertSite, stored: str) -> int:
    """Declares a site's layer to a `StoreBuilder`; its index."""
    return builder.add_layer(
        site.name,
        site.num_experts,
        stored,
        site.hidden,
        site.intermediate,
        site.gated,
        site.has_bias,
    )


def add_tensors(
    builder: Any, layer: int, site: ExpertSite, tensors: Mapping[str, torch.Tensor]
) -> None:
    """Places a site's whole tensors (section → contiguous `[E, …]` on the CPU) where they lie.

    The store reads the memory later: whoever builds it keeps the tensors alive.
    """
    for section, tensor in tensors.items():
        rows, columns = shape_of(site, section)
        nbytes = tensor[0].numel() * tensor.element_size()
        name = dtype_name(tensor.dtype)
        transform = "transpose" if site.transposed else "copy"
        if section[0] == "b":
            transform = "copy" if name == "F32" else "widen"
        if transform == "transpose":
            rows, columns = columns, rows
        for expert in range(site.num_experts):
            builder.add_piece(
                layer,
                expert,
                section,
                offset=tensor.data_ptr() + expert * nbytes,
                nbytes=nbytes,
                transform=transform,
                rows=rows,
                columns=columns,
                dtype=name,
            )


def read_tensors(store: Any, layer: int, site: ExpertSite, dtype: torch.dtype) -> dict[str, Any]:
    """A site's parameters, rebuilt from the store in transformers' layout.

    Returns:
        Section → `[E, …]` tensor of `dtype`, bit-equal to what went in where the type is the same.
    """
    stored = store.layer(layer)["dtype"]
    tensors = {
        section: torch.empty(site.num_experts, *natural_shape(site, section), dtype=dtype)
        for section in site.parameters
    }
    buffer = torch.empty(store.layer(layer)["expert_bytes"], dtype=torch.uint8)
    for expert in range(site.num_experts):
        store.read_expert_into(layer, expert, buffer.data_ptr(), buffer.numel())
        for section, value in unpack(site, stored, buffer).items():
            tensors[section][expert].copy_(value)
    return tensors


def unpack(site: ExpertSite, stored: str, canonical: torch.Tensor) -> dict[str, torch.Tensor]:
    """Views of one expert's canonical bytes (uint8) in the shapes of the module's parameters."""
    needed = expert_bytes(site, stored)
    if canonical.numel() < needed:
        raise InternalError(
            f"{site.name}: got {canonical.numel()} bytes of an expert, expected {needed}"
        )
    views: dict[str, torch.Tensor] = {}
    for section, (offset, size) in section_ranges(site, stored).items():
        kind = torch.float32 if section[0] == "b" else TORCH_DTYPES[stored]
        flat = canonical[offset : offset + size].view(kind)
        if section[0] == "b":
            views[section] = flat
            continue
        matrix = flat.view(shape_of(site, section))
        views[section] = matrix.T if site.transposed else matrix
    return views


def empty_builder(options: Any) -> Any:
    """A `StoreBuilder` with the user's settings."""
    return _core.StoreBuilder(
        chunk_bytes=options.chunk_bytes_as_int(), verify=options.verify, direct=options.direct
    )
