"""How far two correct computations of the same sum may lie apart: the battery's only tolerance.

A stage of a forward pass is a product of length n followed by rounding. It errs by at most one
rounding of its result in the working dtype, plus the accumulation: n terms in fp32 (torch and
sluice both accumulate bf16 and fp16 products in fp32), whose roundings behave like a random walk,
√n · u₃₂. Source: N. J. Higham, T. Mary, "A new approach to probabilistic rounding error analysis"
(SIAM J. Sci. Comput. 41(5), 2019); their λ is `CONFIDENCE`.

Two implementations may each err once, hence `SIDES`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

CONFIDENCE = 4.0
SIDES = 2.0
# What one experts call computes per (token, k): gate, up, activation, product, down, weighting.
EXPERT_ROUNDINGS = 6


def unit_roundoff(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).eps / 2


def tolerance(
    dtype: torch.dtype, reductions: Sequence[int], magnitude: float, *, roundings: int = 0
) -> float:
    """Largest difference that rounding alone explains.

    Args:
        dtype: Of the activations.
        reductions: Length of each reduction between input and output.
        magnitude: Largest absolute value of what is compared.
        roundings: Roundings to `dtype` beside the one that ends each reduction.
    """
    stored = (len(reductions) + roundings) * unit_roundoff(dtype)
    accumulated = sum(math.sqrt(n) for n in reductions) * unit_roundoff(torch.float32)
    return SIDES * CONFIDENCE * magnitude * (stored + accumulated)


def experts_tolerance(
    dtype: torch.dtype, hidden: int, inter: int, top_k: int, magnitude: float
) -> float:
    """For one experts module: gate_up over `hidden`, down over `inter`, combining over `top_k`."""
    lengths = (hidden, inter, top_k)
    return tolerance(dtype, lengths, magnitude, roundings=EXPERT_ROUNDINGS + top_k)
