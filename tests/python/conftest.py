"""Fixtures that more than one test file uses."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from small_store import SmallStore


@pytest.fixture(autouse=True)
def random_state() -> Iterator[None]:
    """Every test gives back torch's generator as it found it."""
    state = torch.get_rng_state()
    yield
    torch.set_rng_state(state)


@pytest.fixture
def small() -> SmallStore:
    return SmallStore()


@pytest.fixture
def run_python(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs a script in a process of its own, with this folder importable."""

    def run(
        script: str, *arguments: str, timeout: float = 120, **environment: str
    ) -> subprocess.CompletedProcess[str]:
        file = tmp_path / "script.py"
        file.write_text(script)
        folder = str(Path(__file__).parent)
        path = os.pathsep.join(filter(None, [folder, os.environ.get("PYTHONPATH", "")]))
        return subprocess.run(
            [sys.executable, str(file), *arguments],
            env={**os.environ, "PYTHONPATH": path, **environment},
            timeout=timeout,
            capture_output=True,
            text=True,
            check=False,
        )

    return run


@pytest.fixture
def no_leftovers() -> Iterator[None]:
    """Objects of a test are gone before the next one counts threads or bytes."""
    gc.collect()
    yield
    gc.collect()
