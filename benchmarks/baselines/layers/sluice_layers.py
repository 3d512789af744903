"""sluice at a share of the experts' slot bytes, without a model around it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from baselines.layers.arm import GATE, LayerArm
from baselines.layers.block import Block
from baselines.layers.gpu import place
from baselines.sluice_arm import fill
from sluice import _core
from sluice.config import OffloadOptions
from sluice.session import Session


class SluiceLayers(LayerArm):
    """A session over the block, or over a pack of it on the disk."""

    def __init__(
        self, mode: str, block: Block, scenario: dict[str, Any], share: float, pack: Path | None
    ) -> None:
        super().__init__(mode, block, scenario, share)
        self.pack = pack
        in_ram = scenario.get("budget", {}).get("host_memory", "100%") == "100%"
        self.state = "pinned" if in_ram else "direct"
        self.session: Any = None
        self.settings: dict[str, Any] = {}

    def setup(self) -> None:
        store = _core.open_pack(str(self.pack))[0] if self.pack is not None else self.block.store()
        budget = self.scenario.get("budget", {})
        settings: dict[str, Any] = {
            "device_memory": f"{self.share * 100:g}%",
            "policy": budget.get("policy", "decayed-lfu"),
            "io_threads": budget.get("io_threads", 4),
        }
        if _core.has_slots_apart(place()):
            settings["host_tier"] = budget.get("host_tier", "inclusive")
            settings["host_memory"] = budget.get("host_memory", "100%")
        options = OffloadOptions(**settings)
        self.settings = options.to_dict()
        gates = [{"name": f"layers.{n}.experts", **GATE} for n in range(self.block.layers)]
        self.session = Session(store, options, gates, place())
        self.session.wait_for_host_tier()
        if self.share == 1.0 and any(self.session.residency()):  # else computed where it lies
            fill(self.session)

    def forward(
        self, layer: int, hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor
    ) -> torch.Tensor:
        return self.session.experts_forward(layer, hidden, ids, weights)

    def counters(self) -> dict[str, Any]:
        return self.session.stats().to_dict()

    def memory(self) -> dict[str, int]:
        stats = self.session.stats()
        return {
            "expert_bytes_granted": stats.budget_bytes,
            "expert_bytes_used": stats.peak_resident_bytes,
            "host_tier_bytes": stats.host_tier_bytes,
            "pinned_bytes": stats.pinned_bytes,
            "workspace_bytes": stats.workspace_bytes,
        }

    def config(self) -> dict[str, Any]:
        return {"mode": self.mode, **self.settings, "pack": "none" if self.pack is None else "made"}

    def close(self) -> None:
        if self.session is not None:
            self.session.close()
        self.session = None
