"""How far two correct computations of the same thing may lie apart: the battery's only tolerance.

Every stage of a forward pass rounds its result to the working dtype, and every step of a reduction
rounds to fp32 (torch and sluice both accumulate bf16 and fp16 products in fp32). Roundings behave
like independent, zero-mean errors, so their number enters by its square root. Source: N. J. Higham,
T. Mary, "A new approach to probabilistic rounding error analysis" (SIAM J. Sci. Comput. 41(5),
2019); their λ is `CONFIDENCE`. Both sides of a comparison err, hence `SIDES`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

CONFIDENCE = 4.0
SIDES = 2
# What an experts call rounds to the working dtype per (token, k): gate, up, activation, product,
# down, weighting; k more of them meet in the token's sum.
EXPERT_ROUNDINGS = 6
# And a decoder layer beside its experts: two norms, q, k, v, scores, softmax, values, output
# projection, rotary products, two residuals.
LAYER_ROUNDINGS = 12


def tolerance(
    dtype: torch.dtype, roundings: int, reductions: Sequence[int], magnitude: float
) -> float:
    """Largest difference that rounding explains.

    Args:
        dtype: Of the activations.
        roundings: How often a value on its way is rounded to `dtype`.
        reductions: Length of each reduction on that way.
        magnitude: Largest absolute value of what is compared.
    """
    stored = roundings * _unit_roundoff(dtype) ** 2
    accumulated = sum(reductions) * _unit_roundoff(torch.float32) ** 2
    return CONFIDENCE * math.sqrt(SIDES * (stored + accumulated)) * magnitude


def experts_tolerance(
    dtype: torch.dtype, *, hidden: int, inter: int, top_k: int, magnitude: float
) -> float:
    """For one experts call: gate_up over `hidden`, down over `inter`, the sum over `top_k`."""
    return tolerance(dtype, EXPERT_ROUNDINGS + top_k, (hidden, inter, top_k), magnitude)


def model_tolerance(
    dtype: torch.dtype, *, layers: int, hidden: int, inter: int, top_k: int, magnitude: float
) -> float:
    """For the logits of a model: its layers in a row, then the head.

    A layer reduces over `hidden` in q, k, v, output projection and experts.
    """
    reductions = [hidden] * (5 * layers + 1) + [inter, top_k] * layers
    roundings = layers * (LAYER_ROUNDINGS + EXPERT_ROUNDINGS + top_k) + 1
    return tolerance(dtype, roundings, reductions, magnitude)


def _unit_roundoff(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).eps / 2
