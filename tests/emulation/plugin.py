"""Puts the module built for the emulation into `sluice._core`'s place, before sluice is imported.

As a pytest plugin (`-p emulation.plugin -p no:faulthandler`, with tests/ on PYTHONPATH) it runs
tests of the package as if the CPU were a GPU: each under a schedule that its name chooses, and
after each every byte, stream and event must have come back. Python processes that a test starts are
on the emulation, too. Elsewhere by `install()`.

Where the module lies: SLUICE_EMULATED_CORE, the path of a `_core*.so`.
"""

from __future__ import annotations

import faulthandler
import gc
import importlib.util
import os
import sys
import time
import zlib
from collections.abc import Iterator
from importlib.machinery import ExtensionFileLoader
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
ORDERS = ("forward", "reverse", "random", "skew")
POLICIES = ("eager", "lazy", "ahead", "random")
STREAMS = ("default", "user")
LEAVING_S = 5.0


def install() -> None:
    """Loads the emulated `_core` by path. Errors: RuntimeError when sluice has its own already."""
    if "sluice._core" in sys.modules:
        raise RuntimeError("the emulation comes too late: sluice._core is imported already")
    path = os.environ["SLUICE_EMULATED_CORE"]
    # Faults of a kernel are a verdict of the emulation, which has handlers of its own.
    faulthandler.disable()
    loader = ExtensionFileLoader("sluice._core", path)
    spec = importlib.util.spec_from_file_location("sluice._core", path, loader=loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["sluice._core"] = module
    loader.exec_module(module)


def choose_schedule(name: str) -> None:
    """Starts the device anew, under a schedule that `name` decides; nothing may be left on it."""
    seed = zlib.crc32(name.encode())
    core = sys.modules["sluice._core"]
    core.emulation_schedule(
        ORDERS[seed % 4], POLICIES[seed // 4 % 4], seed, STREAMS[seed // 16 % 2]
    )


def pytest_load_initial_conftests() -> None:
    """Of a pytest plugin: before any conftest, which may import sluice."""
    install()
    folders = [str(HERE / "children"), str(HERE.parent), os.environ.get("PYTHONPATH", "")]
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, folders))


@pytest.fixture(autouse=True)
def emulated_schedule(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> Iterator[None]:
    """Each test has a schedule of its own, and gives everything back."""
    name = request.node.nodeid
    monkeypatch.setenv("SLUICE_EMULATED_TEST", name)
    choose_schedule(name)
    yield
    gc.collect()  # sessions that only a cycle still holds
    deadline = time.monotonic() + LEAVING_S
    while True:
        try:
            choose_schedule("")
            return
        except Exception:  # a thread that was joined may still be giving its own back
            if time.monotonic() > deadline:
                sys.modules["sluice._core"].emulation_forget()  # the next test is not to blame
                raise
            time.sleep(0.01)
