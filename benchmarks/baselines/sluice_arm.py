"""sluice at a share of the experts' slot bytes."""

from pathlib import Path
from typing import Any

from baselines.arm import Arm


class SluiceArm(Arm):
    """Path Q over the checkpoint's shards, or over a pack that `sluice pack` made beside them.

    Variants: "" shards in place with O_DIRECT; "pack"; "warm": the same pack read through the page
    cache.
    """

    bitwise = True

    def __init__(
        self, mode: str, checkpoint: Path, scenario: dict[str, Any], share: float, variant: str
    ) -> None:
        super().__init__(mode, checkpoint, scenario)
        self.share = share
        self.variant = variant
        self.state = "warm" if variant == "warm" else "direct"
        self.settings: dict[str, Any] = {}

    def load(self) -> Any:
        from transformers import AutoModelForCausalLM

        import sluice

        pack: str | None = None
        if self.variant in {"pack", "warm"}:
            path = self.checkpoint / "experts.sluice.safetensors"
            if not path.exists():
                from sluice.pack import make_pack

                make_pack(self.checkpoint, out=path)
            pack = str(path)
        budget = self.scenario.get("budget", {})
        options = sluice.OffloadOptions(
            device_memory=f"{self.share * 100:g}%",
            policy=budget.get("policy", "decayed-lfu"),
            io_threads=budget.get("io_threads", 4),
            direct=self.variant != "warm",
            pack=pack if pack else "none",
        )
        self.settings = options.to_dict()
        config = sluice.OffloadConfig(**self.settings)
        model = AutoModelForCausalLM.from_pretrained(
            self.checkpoint, dtype=self.dtype, quantization_config=config
        )
        return model.eval()

    def counters(self) -> dict[str, Any]:
        return self.model.sluice.stats().to_dict()

    def config(self) -> dict[str, Any]:
        return {"mode": self.mode, **self.settings}

    def close(self) -> None:
        if self.model is not None:
            self.model.sluice.close()
        super().close()
