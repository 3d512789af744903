"""transformers' own experts, all resident: eager, grouped_mm, batched_mm."""

from pathlib import Path
from typing import Any, ClassVar

from baselines.arm import Arm


class ResidentArm(Arm):
    """One shared model; only the experts implementation differs between these arms."""

    _shared: ClassVar[dict[Path, Any]] = {}
    _NAMES: ClassVar[dict[str, str]] = {
        "eager": "eager",
        "grouped": "grouped_mm",
        "batched": "batched_mm",
    }

    def __init__(self, mode: str, checkpoint: Path, scenario: dict[str, Any], kind: str) -> None:
        super().__init__(mode, checkpoint, scenario)
        self.implementation = self._NAMES[kind]

    def load(self) -> Any:
        from transformers import AutoModelForCausalLM

        if self.checkpoint not in self._shared:
            model = AutoModelForCausalLM.from_pretrained(self.checkpoint, dtype=self.dtype)
            self._shared[self.checkpoint] = model.eval()
        return self._shared[self.checkpoint]

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        self.model.set_experts_implementation(self.implementation)
        return super().generate(*args, **kwargs)

    def config(self) -> dict[str, Any]:
        return {"mode": self.mode, "experts_implementation": self.implementation}

    def close(self) -> None:
        super().close()
        self._shared.pop(self.checkpoint, None)
