"""sluice at a share of the experts' slot bytes."""

import math
import time
from pathlib import Path
from typing import Any

import sluice
from baselines.arm import Arm, shards_of
from disk import read_rate, throttled
from sluice import _core
from sluice.folders import PACK_SUFFIX, bench_folder
from sluice.pack import make_pack


class SluiceArm(Arm):
    """Path Q over the checkpoint's shards, or over a pack that `sluice pack` made beside them.

    Variants: "" shards in place with O_DIRECT; "pack"; "warm": the same pack read through the page
    cache. A scenario's `[disk] read_rate` slows packs down, but not where everything is resident.

    Args:
        policy: Who leaves; None: as the scenario's budget says.
    """

    bitwise = True
    #: Whether the session's own spans say what was demanded when.
    tells_demands = True

    def __init__(
        self,
        mode: str,
        checkpoint: Path,
        scenario: dict[str, Any],
        share: float,
        variant: str,
        *,
        policy: str | None = None,
    ) -> None:
        super().__init__(mode, checkpoint, scenario)
        self.share = share
        self.variant = variant
        self.policy = policy or scenario.get("budget", {}).get("policy", "decayed-lfu")
        in_pack = variant == "pack" and share < 1.0
        self.read_rate = read_rate(scenario) if in_pack else 0
        self.state = "warm" if variant == "warm" else "throttled" if self.read_rate else "direct"
        self.settings: dict[str, Any] = {}
        self.pack: str | None = None

    def load(self) -> Any:
        from transformers import AutoModelForCausalLM

        if self.variant in {"pack", "warm"}:
            path = bench_folder() / self.checkpoint.name / f"experts{PACK_SUFFIX}"
            if not path.exists():
                path.parent.mkdir(parents=True, exist_ok=True)
                make_pack(self.checkpoint, out=path)
            self.pack = str(path)
        budget = self.scenario.get("budget", {})
        options = sluice.OffloadOptions(
            device_memory=f"{self.share * 100:g}%",
            policy=self.policy,
            io_threads=budget.get("io_threads", 4),
            direct=self.variant != "warm",
            pack=self.pack or "none",
        )
        self.settings = options.to_dict()
        config = sluice.OffloadConfig(**self.settings)
        with throttled(self.read_rate):
            model = AutoModelForCausalLM.from_pretrained(
                self.checkpoint, dtype=self.dtype, quantization_config=config
            )
        return model.eval()

    def setup(self) -> None:
        super().setup()
        if self.share == 1.0:
            fill(self.model.sluice)

    def counters(self) -> dict[str, Any]:
        return self.model.sluice.stats().to_dict()

    def memory(self) -> dict[str, int]:
        stats = self.model.sluice.stats()
        files = [Path(self.pack)] if self.pack else shards_of(self.checkpoint)
        return {
            "expert_bytes_granted": stats.budget_bytes,
            "expert_bytes_used": stats.peak_resident_bytes,
            "file_bytes": sum(path.stat().st_size for path in files),
        }

    def demand_extents(self, since_s: float) -> tuple[str, list[tuple[int, int]]]:
        """The pack, and the file extents (offset, bytes) of the demands that began since then."""
        assert self.pack is not None
        tensors = _core.read_safetensors_header(self.pack)["tensors"]
        places = {name: (offset, size) for name, _, _, offset, size in tensors}
        spans = self.model.sluice.spans()
        keys = [(s[3], s[4]) for s in spans if s[0] == "load_demand" and s[1] >= since_s]
        return self.pack, [places[f"layers.{a}.experts.{b}"] for a, b in keys]

    def config(self) -> dict[str, Any]:
        # A pack is named, not placed: no path of a machine enters a row.
        pack = Path(self.pack).name if self.pack else "none"
        rate = {"read_rate_bytes_s": self.read_rate} if self.read_rate else {}
        return {"mode": self.mode, **self.settings, "pack": pack, **rate}

    def close(self) -> None:
        if self.model is not None:
            self.model.sluice.close()
        super().close()


def fill(session: Any) -> None:
    """Brings every expert, so that "all resident" is true from the first sample."""
    store = session.store
    everything = {
        (layer, expert)
        for layer in range(store.num_layers)
        for expert in range(store.layer(layer)["num_experts"])
    }
    deadline = time.monotonic() + 120
    while missing := everything - {
        (layer, expert)
        for pool in session.residency()
        for state, layer, expert, _ in pool
        if state == "ready"
    }:
        if time.monotonic() > deadline:
            raise RuntimeError(f"sluice: {len(missing)} experts came not to be in two minutes")
        # Some at a time: more guesses than the session keeps are dropped.
        session.hint([(*key, 1.0, math.inf) for key in sorted(missing)[:64]])
        time.sleep(0.02)
