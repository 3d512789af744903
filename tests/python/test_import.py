from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable

import pytest

import sluice

Run = Callable[..., subprocess.CompletedProcess[str]]

WHAT_AN_IMPORT_LOADS = """
import json, logging, sys, threading
handlers, threads = list(logging.root.handlers), threading.active_count()
import sluice, sluice.errors, sluice.config, sluice.stats, sluice.session
print(json.dumps({
    "heavy": [m for m in ("matplotlib", "numpy", "torch", "transformers") if m in sys.modules],
    "handlers": logging.root.handlers == handlers,
    "threads": threading.active_count() - threads,
    "level": logging.getLogger("sluice").level,
}))
"""


def test_importing_loads_nothing_heavy_and_touches_nothing_global(run_python: Run) -> None:
    result = run_python(WHAT_AN_IMPORT_LOADS, SLUICE_LOG="")
    assert result.stdout, result.stderr
    assert json.loads(result.stdout) == {"heavy": [], "handlers": True, "threads": 0, "level": 0}


WITHOUT_TORCH = """
import sys
sys.modules["torch"] = None  # as if it were not installed
import sluice
from sluice import _core
print(sluice.__version__, sluice.OffloadOptions(device_memory="1GiB").budget_bytes(0))
print(_core.build_info()["cpu_isa"], issubclass(sluice.CapacityError, MemoryError))
"""


def test_options_and_core_work_where_torch_cannot_be_imported(run_python: Run) -> None:
    result = run_python(WITHOUT_TORCH)
    assert result.returncode == 0, result.stderr
    assert "1073741824" in result.stdout


def test_every_public_name_is_listed_and_nothing_else() -> None:
    assert set(sluice.__all__) <= set(dir(sluice))
    assert sluice.__version__.count(".") == 2
    with pytest.raises(AttributeError, match="no attribute 'offlaod'"):
        _ = sluice.offlaod  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", ["OffloadOptions", "Session", "Stats", "ConfigError"])
def test_public_names_are_those_of_their_modules(name: str) -> None:
    value = getattr(sluice, name)
    assert getattr(sys.modules[value.__module__], name) is value


LOG = """
import logging, sluice.log
sluice.log.configure()
sluice.log.LOGGER.info("seen")
sluice.log.LOGGER.debug("unseen")
"""


def test_the_log_is_silent_until_it_is_asked_for(run_python: Run) -> None:
    assert run_python(LOG, SLUICE_LOG="").stderr == ""
    asked = run_python(LOG, SLUICE_LOG="info").stderr
    assert "seen" in asked
    assert "unseen" not in asked
    assert "expected one of debug" in run_python(LOG, SLUICE_LOG="loud").stderr
