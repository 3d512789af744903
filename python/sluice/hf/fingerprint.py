"""What names a model, so that traces and predictors of one are not used for another."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import nn

from sluice.hf.site import ExpertSite

_SAMPLE = 4096


@torch.no_grad()
def model_fingerprint(model: nn.Module, sites: Sequence[ExpertSite]) -> str:
    """Class, layers x experts, and a hash of what routes: "MixtralForCausalLM 8x32 0123456789ab…".

    The hash is over the beginning of every parameter beside each layer's experts, the router's
    among them, narrowed to bfloat16: the same checkpoint has one name whatever type it is loaded
    in, wherever its experts are, on every way in.
    """
    digest = hashlib.sha256()
    for site in sites:
        block = model.get_submodule(site.name.rpartition(".")[0])
        own = site.name.rpartition(".")[2]
        digest.update(f"{site.name}:{site.num_experts}x{site.hidden}x{site.intermediate}".encode())
        for name, parameter in sorted(block.named_parameters()):
            if not name.startswith(f"{own}."):
                head = parameter.detach().flatten()[:_SAMPLE].to("cpu", torch.bfloat16)
                digest.update(name.encode() + head.view(torch.int16).numpy().tobytes())
    experts = max(site.num_experts for site in sites)
    return f"{type(model).__name__} {len(sites)}x{experts} {digest.hexdigest()[:16]}"
