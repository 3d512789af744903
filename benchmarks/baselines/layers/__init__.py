"""Arms of a stack of MoE layers beside a GPU: no attention, nothing dense, replayed routes.

All but accelerate's compute with the same kernels, so that outputs are equal bit for bit; only who
stays and what overlaps differs. On the emulation of the tests torch's CPU stands for the device.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from baselines.layers.accelerate_layers import AccelerateLayers
from baselines.layers.arm import LayerArm
from baselines.layers.block import Block
from baselines.layers.lru_layers import LruLayers
from baselines.layers.sluice_layers import SluiceLayers

__all__ = ["Block", "LayerArm", "make_layer_arm"]


def make_layer_arm(
    mode: str, block: Block, scenario: dict[str, Any], share: float, pack: Path | None
) -> LayerArm:
    """`sluice`, `lru-overlap`, `lru-demand`, `accelerate-v5`."""
    if mode == "sluice":
        return SluiceLayers(mode, block, scenario, share, pack)
    if mode in {"lru-overlap", "lru-demand"}:
        return LruLayers(mode, block, scenario, share, overlap=mode == "lru-overlap")
    if mode == "accelerate-v5":
        return AccelerateLayers(mode, block, scenario, share)
    raise ValueError(f"mode: got {mode!r}; see baselines/layers/__init__.py")
