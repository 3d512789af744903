"""accelerate's offload of a layer's fused experts."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from baselines.layers.arm import LayerArm
from baselines.layers.gpu import place


class FusedExperts(nn.Module):
    """One layer as transformers 5 keeps it, with its eager loop over the experts that were hit."""

    def __init__(self, gate_up: torch.Tensor, down: torch.Tensor) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(gate_up, requires_grad=False)
        self.down_proj = nn.Parameter(down, requires_grad=False)

    def forward(
        self, hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor
    ) -> torch.Tensor:
        out = torch.zeros_like(hidden)
        for expert in ids.unique().tolist():
            token, position = torch.where(ids == expert)
            gate, up = nn.functional.linear(hidden[token], self.gate_up_proj[expert]).chunk(2, -1)
            rows = nn.functional.linear(nn.functional.silu(gate) * up, self.down_proj[expert])
            out.index_add_(0, token, (rows * weights[token, position, None]).to(out.dtype))
        return out


class AccelerateLayers(LayerArm):
    """accelerate's own hook on each layer's fused experts: all of them come, pageable, and go."""

    bitwise = False
    state = "pageable"

    def setup(self) -> None:
        from accelerate.hooks import AlignDevicesHook, add_hook_to_module

        wanted = self.scenario["workload"].get("accelerate_layers", self.block.layers)
        self.sampled_layers = min(wanted, self.block.layers)
        self.modules = []
        for layer in range(self.sampled_layers):
            module = FusedExperts(*self.block.fused(layer))
            kept = dict(module.named_parameters())
            hook = AlignDevicesHook(
                execution_device=torch.device(place()),
                offload=True,
                io_same_device=True,
                weights_map={name: value.data for name, value in kept.items()},
            )
            add_hook_to_module(module, hook)
            self.modules.append(module)
        self.calls = 0

    def forward(
        self, layer: int, hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor
    ) -> torch.Tensor:
        self.calls += 1
        return self.modules[layer](hidden, ids, weights)

    def counters(self) -> dict[str, Any]:
        return {"bytes_read": self.calls * self.block.experts * self.block.expert_bytes}

    def memory(self) -> dict[str, int]:
        layer = self.block.experts * self.block.expert_bytes
        return {"expert_bytes_granted": layer, "expert_bytes_used": layer}

    def config(self) -> dict[str, Any]:
        return {"mode": self.mode, "layers": self.sampled_layers, "library": "accelerate"}

    def close(self) -> None:
        self.modules = []
