"""The GPU of the layers' arms, or what stands for it: torch's CPU beside the emulated device."""

from __future__ import annotations

import ctypes
from typing import Any

import torch

from sluice import _core


def kind_of_cuda() -> str:
    """ "none", "runtime" (and a device is there) or "emulated"."""
    kind = str(_core.build_info()["cuda"])
    return "none" if kind == "runtime" and _core.num_cuda_devices() == 0 else kind


def place() -> str:
    """Where torch's tensors of a call lie."""
    return "cuda:0" if kind_of_cuda() == "runtime" else "cpu"


def wait_for(gpu: Any, stream: int) -> None:
    event = gpu.record(stream)
    gpu.synchronize(event)
    gpu.release(event)


class OnDevice:
    """Tensors as addresses of the device: torch's own, or copies where the device is emulated."""

    def __init__(self, gpu: Any) -> None:
        self.gpu = gpu
        self.emulated = kind_of_cuda() == "emulated"
        self._kept: list[Any] = []

    def address(self, tensor: torch.Tensor) -> int:
        if not self.emulated:
            return tensor.data_ptr()
        pinned = self.gpu.allocate_pinned(tensor.nbytes)
        memory = self.gpu.allocate(tensor.nbytes)
        ctypes.memmove(pinned.address, tensor.data_ptr(), tensor.nbytes)
        self.gpu.copy(memory.address, pinned.address, tensor.nbytes, 0)
        self._kept += [pinned, memory]
        return memory.address

    def back(self, tensor: torch.Tensor, address: int, stream: int) -> None:
        """What was written at `address` into `tensor`; nothing where they are one."""
        if not self.emulated:
            return
        pinned = self.gpu.allocate_pinned(tensor.nbytes)
        self.gpu.read(pinned.address, address, tensor.nbytes, stream)
        wait_for(self.gpu, stream)
        ctypes.memmove(tensor.data_ptr(), pinned.address, tensor.nbytes)
        self._kept.clear()
