"""Torch's tensors as the core sees them: names of types, and memory by its address."""

from __future__ import annotations

import ctypes

import torch

DTYPE_NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
TORCH_DTYPES = {name: dtype for dtype, name in DTYPE_NAMES.items()}


def tensor_at(address: int, count: int, dtype: torch.dtype, device: str = "cpu") -> torch.Tensor:
    """`count` elements of memory that somebody else owns and keeps, flat, without copying."""
    if device == "cpu":
        memory = (ctypes.c_char * (count * dtype.itemsize)).from_address(address)
        return torch.frombuffer(memory, dtype=dtype)
    return torch.as_tensor(_CudaMemory(address, count * dtype.itemsize), device=device).view(dtype)


class _CudaMemory:
    """Bytes on a GPU, as the CUDA array interface describes them (it has no bfloat16)."""

    def __init__(self, address: int, nbytes: int) -> None:
        self.__cuda_array_interface__ = {
            "shape": (nbytes,),
            "typestr": "|u1",
            "data": (address, False),
            "version": 3,
            "stream": None,  # used on the stream that wrote it: nothing to wait for
        }
