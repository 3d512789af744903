"""Facts about a GPU that are read, not measured: from the CUDA runtime, the driver and sysfs."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sluice import _core
from sluice.memory import read_text

_DRIVER = Path("/proc/driver/nvidia")
_DEVICES = Path("/sys/bus/pci/devices")


@dataclass(frozen=True, slots=True, kw_only=True)
class Gpu:
    """One GPU of this machine. What a container or a kernel does not show is None, never guessed.

    Args:
        device: "cuda:N", by the order of the CUDA runtime.
        count: GPUs that this process sees.
        name: By the driver; where it does not tell, compute capability and multiprocessors.
        driver: The driver's version; where it does not tell, the newest CUDA that it supports.
        pci_address: "0000:3b:00.0".
        link_width: Lanes of PCIe as negotiated.
        link_width_max: Lanes that the GPU has.
        link_speed_max: Rate per lane that the GPU has, in the kernel's words. Not the negotiated
            one, which falls while the GPU idles.
    """

    device: str
    count: int
    name: str
    driver: str
    pci_address: str
    link_width: int | None
    link_width_max: int | None
    link_speed_max: str | None

    def identity(self) -> dict[str, str | int]:
        """What measured constants of the GPU belong to."""
        width = "unknown" if self.link_width is None else self.link_width
        return {"gpu": self.name, "driver": self.driver, "link_width": width}


def find_gpu(ordinal: int = 0) -> Gpu | None:
    """The GPU of that number; None in a build without CUDA, without a driver or without a GPU."""
    count = _core.num_cuda_devices()
    if ordinal >= count:
        return None
    return describe_gpu(_core.cuda_device_facts(ordinal), ordinal, count)


def describe_gpu(
    facts: Mapping[str, Any],
    ordinal: int,
    count: int,
    driver: Path = _DRIVER,
    devices: Path = _DEVICES,
) -> Gpu:
    """What the driver's and the kernel's files add to `_core.cuda_device_facts`.

    The paths are for tests.
    """
    address = str(facts["pci_address"])
    major, minor = divmod(int(facts["compute_capability"]), 10)
    name = _field(driver / "gpus" / address / "information", "Model")
    if _core.build_info()["cuda"] == "emulated":
        name = "emulated"  # its figures are nothing that a real GPU's may be taken for
    version = re.search(r"\s(\d{3,}(?:\.\d+)+)\s", read_text(driver / "version"))
    cuda_version = int(facts["driver_cuda_version"])
    folder = devices / address
    return Gpu(
        device=f"cuda:{ordinal}",
        count=count,
        name=name or f"compute {major}.{minor}, {facts['num_multiprocessors']} multiprocessors",
        driver=version[1]
        if version
        else f"CUDA {cuda_version // 1000}.{cuda_version % 1000 // 10}",
        pci_address=address,
        link_width=_lanes(folder / "current_link_width"),
        link_width_max=_lanes(folder / "max_link_width"),
        link_speed_max=_speed(folder / "max_link_speed"),
    )


def _field(path: Path, key: str) -> str:
    for line in read_text(path).splitlines():
        name, _, value = line.partition(":")
        if name.strip() == key:
            return value.strip()
    return ""


def _lanes(path: Path) -> int | None:
    text = read_text(path).strip()
    # 0 and 63 stand for "unknown" where a hypervisor hides the link.
    return int(text) if text.isdigit() and 0 < int(text) <= 32 else None


def _speed(path: Path) -> str | None:
    text = read_text(path).strip()
    return text if text and not text.lower().startswith("unknown") else None
