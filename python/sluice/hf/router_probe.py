"""Routers of a model as arrays, for predictors that run the next gates early.

Found by structure like the experts: beside a site, the one module whose `weight` is [experts,
hidden]. What is read is used to guess, never to route, so a family that is read wrongly costs
recall and nothing else; tests compare what is read with what the routers choose.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from sluice.errors import UnsupportedModelError
from sluice.hf.attachment import attachment_of
from sluice.hf.detect import find_expert_sites
from sluice.hf.site import ExpertSite
from sluice.predict.training_free.router_weights import RouterWeights

Array = NDArray[Any]

# Names that families give to the norm in front of the MoE block, the nearest first.
_NORMS = (
    "pre_feedforward_layernorm_2",
    "pre_feedforward_layernorm",
    "post_attention_layernorm",
    "pre_mlp_layernorm",
    "ffn_norm",
    "norm",
)
_NO_EXPERT = -1e9


def router_weights(model: nn.Module) -> RouterWeights:
    """Gates, biases and norms of all MoE layers; works offloaded or not.

    Raises:
        UnsupportedModelError: A layer has no module that scores its experts from what enters them.
    """
    attachment = attachment_of(model)
    sites: Sequence[ExpertSite] = (
        find_expert_sites(model) if attachment is None else attachment.sites
    )
    most = max(site.num_experts for site in sites)
    layers = [_layer(model, site, most) for site in sites]
    return RouterWeights(
        **{name: np.stack([layer[name] for layer in layers]) for name in layers[0]}
    )


def _layer(model: nn.Module, site: ExpertSite, num_experts: int) -> dict[str, Array]:
    block_name = site.name.rpartition(".")[0]
    block = model.get_submodule(block_name)
    router = _router(block, site)
    missing = num_experts - site.num_experts

    def per_expert(name: str, fill: float) -> Array:
        value = getattr(router, name, None)
        if value is None:
            value = getattr(block, name, None)
        held = np.zeros(site.num_experts, np.float32) if value is None else _numbers(value)
        return np.concatenate([held, np.full(missing, fill, np.float32)])

    gate = _numbers(router.weight)
    scale, shift, centred = _norm(model, block_name, site.hidden)
    corrected = hasattr(router, "e_score_correction_bias") or hasattr(
        block, "e_score_correction_bias"
    )
    return {
        "gate": np.concatenate([gate, np.zeros((missing, site.hidden), np.float32)]),
        "bias": per_expert("bias", 0.0),
        "correction": per_expert("e_score_correction_bias", _NO_EXPERT),
        "sigmoid": np.array(corrected),
        "scale": scale,
        "shift": shift,
        "centred": np.array(centred),
    }


def _router(block: nn.Module, site: ExpertSite) -> Any:
    own = site.name.rpartition(".")[2]
    for name, module in block.named_modules():
        weight = getattr(module, "weight", None)
        if name.split(".")[0] == own or not isinstance(weight, torch.Tensor):
            continue
        if tuple(weight.shape) == (site.num_experts, site.hidden):
            return module
    raise UnsupportedModelError(
        f"{site.label}: got no router beside it with a weight of [{site.num_experts}, "
        f"{site.hidden}], expected one that reads what its experts read; predict this model from "
        "routes instead"
    )


@torch.no_grad()
def _norm(model: nn.Module, block_name: str, hidden: int) -> tuple[Array, Array, bool]:
    """Scale, shift and whether it centres, asked of the norm itself; 1 and 0 without one."""
    layer = model.get_submodule(block_name.rpartition(".")[0])
    for name in _NORMS:
        norm = getattr(layer, name, None)
        weight = getattr(norm, "weight", None)
        if norm is not None and isinstance(weight, torch.Tensor) and weight.shape == (hidden,):
            break
    else:
        return np.ones(hidden, np.float32), np.zeros(hidden, np.float32), False
    # Mean 0, mean square 1 (but for one channel of an odd width): every norm leaves it as it is.
    wave = torch.ones(1, 1, hidden, device=weight.device, dtype=weight.dtype)
    flat = wave.clone()
    wave[..., 1::2] = -1
    up, down = _numbers(norm(wave))[0, 0], _numbers(norm(-wave))[0, 0]
    scale, shift = (up - down) / 2 * _numbers(wave)[0, 0], (up + down) / 2
    constant = _numbers(norm(flat))[0, 0] - shift
    centred = bool(np.abs(constant).max() < 0.5 * max(float(np.abs(scale).max()), 1e-12))
    return scale, shift, centred


def _numbers(tensor: torch.Tensor) -> Array:
    return tensor.detach().to("cpu", torch.float32).numpy()
