"""Torch's tensors as the core sees them: names of types, and memory by its address."""

from __future__ import annotations

import ctypes

import torch

DTYPE_NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
TORCH_DTYPES = {name: dtype for dtype, name in DTYPE_NAMES.items()}


def tensor_at(address: int, count: int, dtype: torch.dtype) -> torch.Tensor:
    """`count` elements of memory that somebody else owns and keeps, flat, without copying."""
    memory = (ctypes.c_char * (count * dtype.itemsize)).from_address(address)
    return torch.frombuffer(memory, dtype=dtype)
