"""Puts the module built for the emulation into `sluice._core`'s place, before sluice is imported.

As a pytest plugin (`-p tests.emulation.plugin`) or by `install()` in a child process. Where the
module lies: SLUICE_EMULATED_CORE, the path of a `_core*.so`.
"""

from __future__ import annotations

import faulthandler
import importlib.util
import os
import sys
from importlib.machinery import ExtensionFileLoader


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


def pytest_configure() -> None:
    """Of a pytest plugin."""
    install()
