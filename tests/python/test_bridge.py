"""_ops and _core as binaries, and torch's GEMM and pool as the core gets them."""

from __future__ import annotations

import ctypes
import importlib.util
import re
import subprocess

import pytest
import torch

from sluice import _core, ops

FORBIDDEN = ("cuda", "c10", "torch_python", "python3")


def dynamic_section(module: str) -> str:
    spec = importlib.util.find_spec(module)
    if spec is None or spec.origin is None:
        pytest.skip(f"{module} is not built")
    return subprocess.run(
        ["readelf", "-d", spec.origin], capture_output=True, text=True, check=True
    ).stdout


def needed(module: str) -> list[str]:
    return re.findall(r"\(NEEDED\).*\[(.+)\]", dynamic_section(module))


def test_the_operator_needs_torch_cpu_and_no_other_part_of_torch() -> None:
    libraries = needed("sluice._ops")
    assert "libtorch_cpu.so" in libraries
    assert not [name for name in libraries if any(word in name for word in FORBIDDEN)]


def test_the_core_needs_no_torch() -> None:
    libraries = needed("sluice._core")
    assert not [name for name in libraries if "torch" in name]
    assert not [name for name in libraries if any(word in name for word in FORBIDDEN)]


@pytest.mark.parametrize("module", ["sluice._core", "sluice._ops"])
def test_no_module_carries_a_path_of_its_builder(module: str) -> None:
    assert not re.search(r"RPATH|RUNPATH", dynamic_section(module))


class TorchTable(ctypes.Structure):
    """SluiceTorchTable of csrc/bindings/bridge.h."""

    _fields_ = (
        ("version", ctypes.c_int32),
        ("bytes", ctypes.c_int32),
        (
            "gemm",
            ctypes.CFUNCTYPE(
                ctypes.c_int32,
                ctypes.c_int32,
                *[ctypes.c_int64] * 3,
                *[ctypes.c_void_p] * 3,
                ctypes.c_int64,
            ),
        ),
        ("num_threads", ctypes.CFUNCTYPE(ctypes.c_int32)),
        ("parallel_for", ctypes.c_void_p),
        ("last_error", ctypes.CFUNCTYPE(ctypes.c_char_p)),
    )


@pytest.fixture
def torch_table() -> TorchTable:
    if ops.load() != "native":
        pytest.skip("_ops is not built")
    address = torch.ops.sluice.bind(_core.core_table())
    return TorchTable.from_address(address)


DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def at_offset(tensor: torch.Tensor, num_bytes: int) -> torch.Tensor:
    """A contiguous copy whose address is `num_bytes` past a multiple of 4096."""
    buffer = torch.empty(tensor.nbytes + 8192, dtype=torch.uint8)
    start = -buffer.data_ptr() % 4096 + num_bytes
    copy = buffer[start : start + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
    copy.copy_(tensor)
    return copy


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", [1, 2, 5, 16, 33, 128])
def test_products_have_the_bits_of_mm_wherever_the_weights_lie(
    torch_table: TorchTable, dtype: torch.dtype, rows: int
) -> None:
    columns, inner, stride = 96, 64, 104
    a = torch.randn(rows, inner).to(dtype)
    b = torch.randn(columns, inner).to(dtype)
    expected = a @ b.t()
    for offset in (0, 64, 128, 960, 4032):  # slots are 64-byte aligned: part of law 1
        weights = at_offset(b, offset)
        out = torch.full((rows, stride), 7.0, dtype=dtype)
        code = torch_table.gemm(
            DTYPES.index(dtype),
            rows,
            columns,
            inner,
            a.data_ptr(),
            weights.data_ptr(),
            out.data_ptr(),
            stride,
        )
        assert code == 0
        assert torch.equal(out[:, :columns], expected)
        assert (out[:, columns:] == 7.0).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_twins_product_has_the_same_bits(dtype: torch.dtype) -> None:
    rows, columns, inner, stride = 9, 32, 48, 40
    a, b = torch.randn(rows, inner).to(dtype), torch.randn(columns, inner).to(dtype)
    out = torch.full((rows, stride), 7.0, dtype=dtype)
    name = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}[dtype]
    addresses = (a.data_ptr(), b.data_ptr(), out.data_ptr())
    ops.gemm(name, rows, columns, inner, *addresses, stride)
    assert torch.equal(out[:, :columns], a @ b.t())
    assert (out[:, columns:] == 7.0).all()


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_products_work_in_every_gradient_mode(torch_table: TorchTable, mode: type) -> None:
    with mode():
        a, b, out = torch.randn(6, 8), torch.randn(4, 8), torch.empty(6, 4)
        addresses = (a.data_ptr(), b.data_ptr(), out.data_ptr())
        assert torch_table.gemm(0, 6, 4, 8, *addresses, 4) == 0
        assert torch.equal(out, a @ b.t())


def test_a_failed_product_says_why(torch_table: TorchTable) -> None:
    assert torch_table.gemm(9, 1, 1, 1, None, None, None, 1) != 0
    assert torch_table.last_error()


def test_the_core_uses_as_many_threads_as_torch_was_told(torch_table: TorchTable) -> None:
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        assert torch_table.num_threads() == _core.num_threads() == 1
    finally:
        torch.set_num_threads(before)


def test_tables_of_another_build_are_refused(torch_table: TorchTable) -> None:
    other = (ctypes.c_int32 * 2)(99, 8)
    with pytest.raises(_core.ConfigError, match="version 99 with 8 bytes"):
        _core.set_torch_table(ctypes.addressof(other))
    with pytest.raises(RuntimeError, match="different builds"):
        torch.ops.sluice.bind(ctypes.addressof(other))
