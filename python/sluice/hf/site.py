"""One MoE layer's experts module, as everything behind detection sees it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from sluice.errors import UnsupportedModelError
from sluice.tensors import DTYPE_NAMES


@dataclass(frozen=True, slots=True, eq=False)
class ExpertSite:
    """One experts module and everything the engine must know of it.

    Shapes: w13 `[E, 2I, H]` (`[E, I, H]` without a gate), w2 `[E, H, I]`; both with their last two
    dimensions swapped where `transposed`. Sizes are those of the tensors, not of a config.
    """

    name: str
    module: nn.Module
    num_experts: int
    hidden: int
    intermediate: int
    gated: bool
    has_bias: bool
    transposed: bool
    concatenated: bool
    has_post_norm: bool

    @property
    def parameters(self) -> dict[str, str]:
        """Section of the canonical layout → parameter of the module."""
        first = "gate_up_proj" if self.gated else "up_proj"
        names = {"w13": first, "w2": "down_proj"}
        if self.has_bias:
            names |= {"b13": f"{first}_bias", "b2": "down_proj_bias"}
        return names

    @property
    def dtype(self) -> torch.dtype:
        """The type that activations have."""
        return self.module.down_proj.dtype  # type: ignore[return-value]

    @property
    def w13_rows(self) -> int:
        """Rows of an expert's first matrix."""
        return (2 if self.gated else 1) * self.intermediate

    @property
    def weight_bytes(self) -> int:
        """Bytes of this site's parameters as the module holds them."""
        return sum(p.numel() * p.element_size() for p in self.module.parameters(recurse=False))

    @property
    def num_parameters(self) -> int:
        """Parameters of all its experts, wherever they are."""
        each = (self.w13_rows + self.intermediate) * self.hidden
        biases = self.w13_rows + self.hidden if self.has_bias else 0
        return self.num_experts * (each + biases)

    @property
    def label(self) -> str:
        """Site and class, for error messages."""
        return f"{self.name} ({type(self.module).__name__})"


def dtype_name(dtype: torch.dtype) -> str:
    """The engine's name of a plain dtype; UnsupportedModelError on any other."""
    if dtype not in DTYPE_NAMES:
        raise UnsupportedModelError(
            f"experts: got {dtype}, expected one of {', '.join(map(str, DTYPE_NAMES))}; "
            "quantised experts are not supported yet"
        )
    return DTYPE_NAMES[dtype]
