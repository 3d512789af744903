"""A GPU, or the emulation where SLUICE_EMULATED_CORE names its `_core`; else all is skipped.

SLUICE_REQUIRE_CUDA=1 makes a missing GPU a failure instead. SLUICE_GPU_TESTS names the library of
native/ (check.py builds it); without it the tests of the wrappers and of the runtime are skipped.
"""

from __future__ import annotations

import ctypes
import gc
import os
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
for folder in ("tests", "tests/python", "benchmarks"):  # their helpers are shared
    if str(ROOT / folder) not in sys.path:
        sys.path.append(str(ROOT / folder))
if "SLUICE_EMULATED_CORE" in os.environ:  # before anything imports sluice
    from emulation.plugin import install

    install()

from sluice import _core  # noqa: E402

from .device import Device, emulated  # noqa: E402

ORDERS = ("forward", "reverse", "random", "skew")
POLICIES = ("eager", "lazy", "ahead", "random")


def why_not() -> str:
    """Empty where these tests can run."""
    kind = _core.build_info()["cuda"]
    if kind == "none":
        return "no CUDA in this build of sluice"
    if _core.num_cuda_devices() == 0:
        return "no CUDA device found"
    return ""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    missing = why_not()
    for item in items:
        if here not in item.path.parents:
            continue
        item.add_marker(pytest.mark.gpu)
        if missing and os.environ.get("SLUICE_REQUIRE_CUDA") != "1":
            item.add_marker(pytest.mark.skip(reason=missing))


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") and (missing := why_not()):
        pytest.fail(f"SLUICE_REQUIRE_CUDA=1: {missing}", pytrace=False)


@pytest.fixture
def gpu(request: pytest.FixtureRequest) -> Iterator[Device]:
    """The device's room; on the emulation under a schedule of its own, and all must come back."""
    seed = zlib.crc32(request.node.nodeid.encode())
    if emulated():
        order, policy = ORDERS[seed % 4], POLICIES[seed // 4 % 4]
        _core.emulation_schedule(order, policy, seed, "default")  # type: ignore[attr-defined]
    device = Device()
    yield device
    device.close()
    if emulated():
        gc.collect()  # arrays that a failure's traceback does not hold
        _core.emulation_schedule("forward", "eager", 0, "default")  # type: ignore[attr-defined]


@pytest.fixture(scope="session")
def library() -> ctypes.CDLL:
    """The library of native/."""
    path = os.environ.get("SLUICE_GPU_TESTS")
    if path is None:
        pytest.skip("SLUICE_GPU_TESTS names no library (tests/gpu/check.py builds it)")
    return open_library(path)


def open_library(path: str) -> ctypes.CDLL:
    loaded = ctypes.CDLL(path)
    for name in ("probe_mma", "probe_ldmatrix", "probe_load_stream", "probe_cp_async",
                 "probe_messages", "probe_chain", "probe_shuffle", "probe_vote",
                 "semantics_runtime", "semantics_facts", "semantics_run"):  # fmt: skip
        getattr(loaded, name).restype = ctypes.c_char_p
    return loaded
