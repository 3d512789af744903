"""Which device a model's experts run on: the one where the rest of it lies."""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import nn

from sluice import _core
from sluice.errors import UnsupportedModelError

_log = logging.getLogger("sluice")


def device_of(model: nn.Module) -> str:
    """The name as sessions have it, "cpu" or "cuda:N".

    Raises:
        UnsupportedModelError: Several devices, an accelerator that is no CUDA device, or a build
            without CUDA.
    """
    names = {name_of(parameter.device) for parameter in model.parameters()} - {"meta"}
    if len(names) > 1:
        raise UnsupportedModelError(
            f"{type(model).__name__}: got parameters on {', '.join(sorted(names))}, but this build "
            "of sluice offloads to one device; load the model with device_map='cuda:0' or 'cpu'"
        )
    name = next(iter(names), "cpu")
    check_device(name, type(model).__name__)
    return name


def choose_device(name: str) -> str:
    """`name`, or for "auto" the first GPU that both this build and torch compute on, else "cpu".

    Raises:
        UnsupportedModelError: As `check_device`.
    """
    if name != "auto":
        check_device(name, "device")
        return name
    return "cuda:0" if _core.num_cuda_devices() and torch.cuda.is_available() else "cpu"


def check_device(name: str, what: str) -> None:
    """Refuses a device that this build cannot compute on.

    Raises:
        UnsupportedModelError: Naming `what` was to be put there.
    """
    if name in ("cpu", "meta"):
        return
    if not name.startswith("cuda"):
        raise UnsupportedModelError(
            f"{what}: got {name}, expected the CPU or a CUDA device; use device_map='cpu'"
        )
    if _core.build_info()["cuda"] == "none":
        raise UnsupportedModelError(
            f"{what}: got {name}, but this build of sluice is without CUDA and keeps its slots on "
            "the CPU; build it where nvcc is found, or use device_map='cpu'"
        )
    if _core.num_cuda_devices() == 0:
        raise UnsupportedModelError(
            f"{what}: got {name}, but this process sees no CUDA device (nvidia-smi may know why); "
            "use device_map='cpu'"
        )


def check_device_map(device_map: Any) -> None:
    """Refuses a map that names a device of no use, before anything is loaded.

    Raises:
        UnsupportedModelError: Several CUDA devices, or one of `check_device`'s.
    """
    values = device_map.values() if isinstance(device_map, dict) else [device_map]
    gpus: set[str] = set()
    for value in values:
        text = f"cuda:{value}" if isinstance(value, int) else str(value)
        if text.startswith(("cuda", "mps", "xpu")):
            check_device(text, "device_map")
            gpus.add(name_of(torch.device(text)))
        if text == "disk":
            _log.warning(
                "device_map: 'disk' is left to accelerate; sluice moves experts only, whatever the "
                "map says of them"
            )
    if len(gpus) > 1:
        raise UnsupportedModelError(
            f"device_map: got {', '.join(sorted(gpus))}, but this build of sluice offloads to one "
            "device; name one"
        )


def name_of(device: torch.device) -> str:
    """As torch prints it; a CUDA device without a number is the current one."""
    if str(device) == "cuda":
        return f"cuda:{torch.cuda.current_device() if torch.cuda.is_available() else 0}"
    return str(device)
