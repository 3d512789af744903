"""Arrays on the device, from numpy and back, by `_core._cuda`: no torch, so that nothing of it
stands between a kernel and compute-sanitizer."""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np
import numpy.typing as npt

from sluice import _core

Values = npt.NDArray[Any]
SILU = {"kind": "silu", "interleaved": False, "alpha": 1.702, "limit": 7.0}


def emulated() -> bool:
    return _core.build_info()["cuda"] == "emulated"


def cuda() -> Any:
    """`_core._cuda`, which no stub names."""
    return _core._cuda  # type: ignore[attr-defined]


# ---- numbers of 16 bits ----


def to_bits(values: Values, dtype: str) -> Values:
    """The nearest numbers of `dtype` ("BF16", "F16", "F32"), as their bytes, ties to even."""
    single = np.ascontiguousarray(values, dtype=np.float32)
    if dtype == "F32":
        return single
    if dtype == "F16":
        return single.astype(np.float16)
    bits = single.view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def from_bits(bits: Values, dtype: str) -> npt.NDArray[np.float32]:
    if dtype == "BF16":
        return (bits.astype(np.uint32) << 16).view(np.float32)
    return bits.astype(np.float32)


def storage(dtype: str) -> type:
    return {"BF16": np.uint16, "F16": np.float16, "F32": np.float32}[dtype]


class Array:
    """Memory of the device, with the shape and numpy type of what was put there."""

    def __init__(self, device: Device, shape: tuple[int, ...], dtype: Any) -> None:
        self.device = device
        self.shape, self.dtype = shape, np.dtype(dtype)
        self.nbytes = int(np.prod(shape)) * self.dtype.itemsize
        self._memory = device.gpu.allocate(max(self.nbytes, 16))
        self.address: int = self._memory.address

    def write(self, values: Values) -> Array:
        data = np.ascontiguousarray(values, dtype=self.dtype)
        assert data.shape == self.shape
        self.device.transfer(self, data.tobytes())
        return self

    def read(self) -> Values:
        """Waits for stream 0, on which these tests run."""
        return np.frombuffer(self.device.fetch(self), dtype=self.dtype).reshape(self.shape).copy()


class Device:
    """One `_core._cuda.Gpu` and pinned memory to go through."""

    def __init__(self, **traits: int) -> None:
        self.gpu: Any = cuda().Gpu(0, **traits)
        self._pinned: Any = None

    def empty(self, shape: tuple[int, ...], dtype: Any) -> Array:
        """All ones: NaN in every float format, no number that a kernel writes."""
        array = Array(self, shape, dtype)
        self.transfer(array, b"\xff" * array.nbytes)
        return array

    def array(self, values: Values) -> Array:
        return Array(self, values.shape, values.dtype).write(values)

    def transfer(self, array: Array, data: bytes) -> None:
        if not data:
            return
        pinned = self._room(len(data))
        ctypes.memmove(pinned, data, len(data))
        self.gpu.copy(array.address, pinned, len(data), 0)
        self.wait()

    def fetch(self, array: Array) -> bytes:
        if not array.nbytes:
            return b""
        pinned = self._room(array.nbytes)
        self.gpu.read(pinned, array.address, array.nbytes, 0)
        self.wait()
        return ctypes.string_at(pinned, array.nbytes)

    def wait(self, stream: int = 0) -> None:
        event = self.gpu.record(stream)
        self.gpu.synchronize(event)
        self.gpu.release(event)

    def close(self) -> None:
        self._pinned = None
        self.gpu = None

    def _room(self, nbytes: int) -> int:
        if self._pinned is None or self._pinned.nbytes < nbytes:
            self._pinned = None
            self._pinned = self.gpu.allocate_pinned(nbytes)
        return self._pinned.address
