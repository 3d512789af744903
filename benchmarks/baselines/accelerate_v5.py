"""accelerate's disk offload as transformers 5 does it: the fused experts module is one module, so
all experts of a layer are read from the offload folder on every forward."""

import shutil
from pathlib import Path
from typing import Any

from baselines.arm import Arm
from baselines.page_cache import evict


class AccelerateArm(Arm):
    """`device_map` puts every experts module on "disk", the rest on the CPU."""

    def __init__(
        self, mode: str, checkpoint: Path, scenario: dict[str, Any], *, cold: bool
    ) -> None:
        super().__init__(mode, checkpoint, scenario)
        self.cold = cold
        self.state = "cold" if cold else "warm"
        self.folder = checkpoint / f"accelerate-offload-{self.state}"

    def load(self) -> Any:
        import torch
        from transformers import AutoModelForCausalLM

        from checkpoints import build_config

        with torch.device("meta"):
            meta = AutoModelForCausalLM.from_config(build_config(self.scenario["model"]))
        device_map: dict[str, str] = {}
        for name, module in meta.named_modules():
            if name.endswith(".experts"):
                device_map[name] = "disk"
            elif not any(module.children()) and (
                list(module.parameters(recurse=False)) or list(module.buffers(recurse=False))
            ):
                device_map[name] = "cpu"
        for name, _ in meta.named_parameters():
            covered = any(name == k or name.startswith(k + ".") for k in device_map)
            if not covered:
                device_map[name] = "cpu"
        model = AutoModelForCausalLM.from_pretrained(
            self.checkpoint,
            dtype=self.dtype,
            device_map=device_map,
            offload_folder=str(self.folder),
            experts_implementation="eager",
        )
        return model.eval()

    def files(self) -> list[Path]:
        """What experts are read from: transformers re-saves them into the offload folder."""
        files = [p for p in self.folder.rglob("*") if p.is_file()]
        if not files:
            raise RuntimeError(
                f"{self.folder}: nothing was offloaded; this arm would not be faithful"
            )
        return files

    def setup(self) -> None:
        super().setup()
        if self.cold:
            evict(self.files())

    def after_forward(self) -> None:
        if self.cold:
            evict(self.files())

    def counters(self) -> dict[str, Any]:
        with open("/proc/self/io") as file:
            fields = dict(line.split(": ") for line in file.read().splitlines())
        return {"bytes_read": int(fields["read_bytes"]), "rchar": int(fields["rchar"])}

    def config(self) -> dict[str, Any]:
        return {
            "mode": self.mode,
            "experts": "disk",
            "rest": "cpu",
            "experts_implementation": "eager",
            "pid_io": "read_bytes of the process",
            "evicted": self.cold,
        }

    def close(self) -> None:
        super().close()
        shutil.rmtree(self.folder, ignore_errors=True)
