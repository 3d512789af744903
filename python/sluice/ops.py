"""Registers `torch.ops.sluice.experts_forward`.

Two builds of one operator: `_ops` (C++, no GIL from entry to exit), bound here to `_core`; where
the package was built without torch, or SLUICE_NO_OPS=1, a twin in Python over the same core, whose
matrix products come back to Python. Both have the schema and the fake kernel below.
"""

from __future__ import annotations

import importlib.util
import os
import threading
from collections.abc import Callable
from typing import Any

import torch

from sluice import _core
from sluice.errors import ConfigError, UnsupportedModelError
from sluice.tensors import DTYPE_NAMES, TORCH_DTYPES, tensor_at

SCHEMA = (
    "experts_forward(int handle, int layer, Tensor hidden, Tensor ids, Tensor weights) -> Tensor"
)
_NO_GRADIENT = (
    "experts offloaded by sluice have no gradient; use torch.no_grad() or sluice.restore(model)"
)

_lock = threading.Lock()
_build: str | None = None
_libraries: list[torch.library.Library] = []  # an operator lives as long as its library


def load() -> str:
    """Registers the operator, once per process.

    Returns:
        "native" or "python".

    Raises:
        ConfigError: `_ops` is there and this torch cannot load it.
    """
    global _build  # noqa: PLW0603
    with _lock:
        if _build is None:
            path = _native_path()
            if path is None:
                register_twin("sluice")
                _core.set_python_gemm(gemm)
                _build = "python"
            else:
                _load_native(path)
                _build = "native"
            register_fake("sluice")
        return _build


def register_twin(namespace: str) -> None:
    """Defines the operator in Python under `namespace`."""
    library = torch.library.Library(namespace, "DEF")
    library.define(SCHEMA)
    for key in ("CPU", "CUDA"):
        library.impl("experts_forward", experts_forward, key)
    _libraries.append(library)


def register_fake(namespace: str) -> None:
    """Tells the compiler what the operator returns."""

    def fake(
        handle: int, layer: int, hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor
    ) -> torch.Tensor:
        return hidden.new_empty(hidden.shape)

    torch.library.register_fake(f"{namespace}::experts_forward", fake)


def experts_forward(
    handle: int, layer: int, hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor
) -> torch.Tensor:
    """The twin: the checks and the call of `_ops`, in Python.

    Shapes: hidden `[T, H]`, ids and weights `[T, K]` → `[T, H]`.
    """
    _check(hidden, ids, weights)
    out = hidden.new_empty(hidden.shape)
    dense_hidden, dense_ids, dense_weights = map(_dense, (hidden, ids, weights))
    _core.forward(
        handle,
        layer,
        hidden.shape[0],
        ids.shape[1],
        hidden.shape[1],
        DTYPE_NAMES[hidden.dtype],
        DTYPE_NAMES[weights.dtype],
        dense_hidden.data_ptr(),
        dense_ids.data_ptr(),
        dense_weights.data_ptr(),
        out.data_ptr(),
        *_place(hidden),
    )
    return out


def _dense(tensor: torch.Tensor) -> torch.Tensor:
    """Contiguous, on a 16-byte boundary: what kernels read. A view may be neither."""
    dense = tensor.contiguous()
    return dense if dense.data_ptr() % 16 == 0 else dense.clone()


class NoGradient(torch.autograd.Function):
    """A forward whose output may be looked at, and whose backward raises by name."""

    @staticmethod
    def forward(  # noqa: PLR0917  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any,
        run: Callable[..., torch.Tensor],
        layer: int,
        hidden: torch.Tensor,
        ids: torch.Tensor,
        weights: torch.Tensor,
    ) -> torch.Tensor:
        """`run(layer, hidden, ids, weights)`."""
        return run(layer, hidden, ids, weights)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> Any:
        """Raises UnsupportedModelError."""
        raise UnsupportedModelError(_NO_GRADIENT)


def gemm(  # noqa: PLR0917
    dtype: str, m: int, n: int, k: int, a: int, b: int, c: int, ldc: int
) -> None:
    """c[m, n] = a[m, k] · b[n, k]^T on raw addresses; rows of c are `ldc` apart."""
    kind = TORCH_DTYPES[dtype]
    out = tensor_at(c, (m - 1) * ldc + n, kind).as_strided((m, n), (ldc, 1))
    with torch.no_grad():
        torch.mm(
            tensor_at(a, m * k, kind).view(m, k), tensor_at(b, n * k, kind).view(n, k).t(), out=out
        )


def _check(hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> None:
    def refuse(name: str, got: Any, expected: str) -> RuntimeError:
        return RuntimeError(f"sluice::experts_forward: {name}: got {got}, expected {expected}")

    if hidden.dim() != 2:
        raise refuse("hidden", list(hidden.shape), "[T, H]")
    if ids.dim() != 2 or ids.shape[0] != hidden.shape[0]:
        raise refuse("ids", list(ids.shape), f"[{hidden.shape[0]}, K]")
    if weights.shape != ids.shape:
        raise refuse("weights", list(weights.shape), str(list(ids.shape)))
    for name, tensor in (("hidden", hidden), ("weights", weights)):
        if tensor.dtype not in DTYPE_NAMES:
            raise refuse(name, tensor.dtype, "float32, bfloat16 or float16")
    if ids.dtype != torch.int64:
        raise refuse("ids", ids.dtype, "int64")
    if any(tensor.device != hidden.device for tensor in (ids, weights)):
        raise refuse("tensors", [hidden.device, ids.device, weights.device], "one device for all")


def _place(tensor: torch.Tensor) -> tuple[int, int]:
    """(device, stream) as the core has them: -1 and 0 on the CPU."""
    if tensor.device.type == "cpu":
        return -1, 0
    return tensor.device.index, torch.cuda.current_stream(tensor.device).cuda_stream


def _native_path() -> str | None:
    """Where `_ops` lies. By its spec: an editable install keeps it away from the sources."""
    if os.environ.get("SLUICE_NO_OPS") == "1":
        return None
    spec = importlib.util.find_spec("sluice._ops")
    return spec.origin if spec is not None else None


def _load_native(path: str) -> None:
    try:
        torch.ops.load_library(path)
        table = torch.ops.sluice.bind(_core.core_table())
    except (OSError, RuntimeError) as error:
        raise ConfigError(
            f"_ops: torch {torch.__version__} cannot load {path}: {error}; reinstall sluice with "
            "--no-build-isolation beside this torch, or set SLUICE_NO_OPS=1"
        ) from error
    _core.set_torch_table(table)
