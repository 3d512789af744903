"""What every arm of a stack of layers is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch

from baselines.layers.block import Block

GATE = {"kind": "silu", "interleaved": False, "alpha": 1.702, "limit": 7.0}


class LayerArm(ABC):
    """Computes layer after layer; `setup` once, `forward` often, `close` at the end."""

    bitwise = True
    state = "pinned"
    #: Layers that a sample goes through; None: all.
    sampled_layers: int | None = None

    def __init__(self, mode: str, block: Block, scenario: dict[str, Any], share: float) -> None:
        self.mode, self.block, self.scenario, self.share = mode, block, scenario, share

    @abstractmethod
    def setup(self) -> None: ...

    @abstractmethod
    def forward(
        self, layer: int, hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor
    ) -> torch.Tensor: ...

    @abstractmethod
    def counters(self) -> dict[str, Any]:
        """Of sluice.stats.Stats, as far as the arm has them."""

    @abstractmethod
    def memory(self) -> dict[str, int]: ...

    def config(self) -> dict[str, Any]:
        return {"mode": self.mode}

    @abstractmethod
    def close(self) -> None: ...
