"""Which function a family computes between an expert's two GEMMs, found by asking it.

The module's own gate runs on a fixed grid on the CPU (no weights are needed, so models on the meta
device answer too) and is compared with the closed forms that have kernels (`kernels/gate.h`). Names
in configs are never believed. What matches nothing runs through a callback, slower and counted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from sluice.hf.site import ExpertSite
from sluice.tensors import TORCH_DTYPES, tensor_at

# Both signs, zero, and magnitudes at which every clamp bites and gelu differs from its tanh form.
_MAGNITUDES = (1e-3, 0.1, 0.5, 0.75, 1.0, 1.5, 2.0, 2.75, 3.5, 5.0, 6.9, 7.1, 9.5, 20.0, 1e2, 1e4)
_GRID = (*(-m for m in reversed(_MAGNITUDES)), 0.0, *_MAGNITUDES)
_COLUMNS = 16

GateFn = Callable[[torch.Tensor], torch.Tensor]
NativeCallback = Callable[..., None]


@dataclass(frozen=True, slots=True)
class Gate:
    """What the engine runs for a site: a kernel's name and parameters, or "generic"."""

    kind: str
    interleaved: bool = False
    alpha: float = 1.702
    limit: float = 7.0

    @property
    def is_generic(self) -> bool:
        """Whether the module's own Python runs between the GEMMs."""
        return self.kind == "generic"


def gate_function(site: ExpertSite) -> GateFn:
    """The module's own gate as a plain function of w13's output `[M, 2I]` (`[M, I]` ungated)."""
    module: Any = site.module
    return module._apply_gate if site.gated else module.act_fn


def fingerprint(site: ExpertSite) -> Gate:
    """The kernel that computes this site's gate, proven on the grid, else "generic"."""
    function = gate_function(site)
    gate, up = _probe_values()
    try:
        for interleaved in _layouts(site):
            got = _ask(function, gate, up, site.gated, interleaved)
            for kind, alpha, limit in _candidates(site):
                if _matches(got, closed_form(kind, gate, up, alpha, limit), gate, up):
                    return Gate(kind, interleaved, alpha, limit)
    except (RuntimeError, TypeError, AttributeError, NotImplementedError):
        # The gate does not run alone on the CPU (weights on meta, an argument more): no kernel.
        return Gate("generic")
    return Gate("generic")


def closed_form(
    kind: str, gate: torch.Tensor, up: torch.Tensor, alpha: float, limit: float
) -> torch.Tensor:
    """The definition of `kernels/gate.h` in torch; kinds without a gate see `up` alone."""
    capped, clamped = gate.clamp(max=limit), up.clamp(-limit, limit)
    forms: dict[str, Callable[[], torch.Tensor]] = {
        "silu": lambda: F.silu(gate) * up,
        "gelu": lambda: F.gelu(gate) * up,
        "gelu_tanh": lambda: F.gelu(gate, approximate="tanh") * up,
        "relu": lambda: F.relu(gate) * up,
        "clamped_silu": lambda: F.silu(capped) * clamped,
        "oai_swiglu": lambda: capped * torch.sigmoid(alpha * capped) * (clamped + 1),
        "relu2": lambda: F.relu(up).square(),
        "silu_only": lambda: F.silu(up),
        "gelu_only": lambda: F.gelu(up),
        "relu_only": lambda: F.relu(up),
    }
    return forms[kind]()


def native_callback(function: GateFn, device: Callable[[], str] = lambda: "cpu") -> NativeCallback:
    """`function` as the engine calls it: on its own buffers, wrapped without copying.

    Called as fn(layer, dtype, rows, in_columns, out_columns, in_address, out_address).

    The engine calls with the GIL on the caller's thread; what is raised ends the forward and comes
    out of it. `function` must not hold the session, or neither would ever be freed.
    """

    def call(*arguments: Any) -> None:
        _layer, dtype, rows, in_columns, out_columns, in_address, out_address = arguments
        kind = TORCH_DTYPES[dtype]
        place = device()
        source = tensor_at(in_address, rows * in_columns, kind, place).view(rows, in_columns)
        target = tensor_at(out_address, rows * out_columns, kind, place).view(rows, out_columns)
        with torch.no_grad():
            target.copy_(function(source))

    return call


def _probe_values() -> tuple[torch.Tensor, torch.Tensor]:
    gate, up = torch.meshgrid(torch.tensor(_GRID), torch.tensor(_GRID), indexing="ij")
    short = -gate.numel() % _COLUMNS
    gate = torch.cat([gate.flatten(), torch.ones(short)])
    up = torch.cat([up.flatten(), torch.ones(short)])
    return gate.view(-1, _COLUMNS), up.view(-1, _COLUMNS)


def _layouts(site: ExpertSite) -> tuple[bool, ...]:
    if not site.gated:
        return (False,)
    return (False, True) if site.concatenated else (True, False)


@torch.no_grad()
def _ask(
    function: GateFn, gate: torch.Tensor, up: torch.Tensor, gated: bool, interleaved: bool
) -> torch.Tensor:
    if not gated:
        return function(up.clone())
    joined = torch.stack([gate, up], -1).flatten(-2) if interleaved else torch.cat([gate, up], -1)
    return function(joined)


def _candidates(site: ExpertSite) -> Iterator[tuple[str, float, float]]:
    if not site.gated:
        for kind in ("relu2", "silu_only", "gelu_only", "relu_only"):
            yield kind, 1.702, 7.0
        return
    for kind in ("silu", "gelu", "gelu_tanh", "relu"):
        yield kind, 1.702, 7.0
    numbers = [
        float(value)
        for value in vars(site.module).values()
        if isinstance(value, int | float) and not isinstance(value, bool)
    ]
    limits = [value for value in dict.fromkeys([*numbers, 7.0]) if 0 < value < 1e3]
    for limit in limits:
        yield "clamped_silu", 1.702, limit
    for alpha in [value for value in dict.fromkeys([*numbers, 1.702, 1.0]) if 0 < value < 100]:
        for limit in limits:
            yield "oai_swiglu", alpha, limit


def _matches(
    got: torch.Tensor, expected: torch.Tensor, gate: torch.Tensor, up: torch.Tensor
) -> bool:
    """Equal up to fp32 rounding of the factors: gelu(-5) cancels to the last bits, times 1e4."""
    if got.shape != expected.shape:
        return False
    allowed = 1e-5 * expected.abs() + 1e-6 * (1 + gate.abs()) * (1 + up.abs())
    return bool(((got - expected).abs() <= allowed).all())


def post_norm_function(module: nn.Module) -> GateFn | None:
    """What is applied to each expert's output before the routing weight, if anything."""
    return getattr(module, "post_expert_norm", None)
