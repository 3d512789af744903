"""Logging: silent until the user's program, or SLUICE_LOG, asks for it; and `tell`, which is not.

The core writes its records into a ring; they are pulled from Python, so that no worker thread ever
waits for the interpreter.
"""

from __future__ import annotations

import logging
import os
import sys

from sluice import _core
from sluice.errors import ConfigError
from sluice.progress import bars_disabled

LOGGER = logging.getLogger("sluice")
LOGGER.addHandler(logging.NullHandler())

_LEVELS = ("debug", "info", "warning", "error")


def configure(level: str | None = None) -> None:
    """Sends records of `level` and above to stderr.

    Args:
        level: "debug", "info", "warning" or "error"; None takes SLUICE_LOG, and does nothing where
            that is not set.

    Raises:
        ConfigError: No such level.
    """
    name = level if level is not None else os.environ.get("SLUICE_LOG", "")
    if not name:
        return
    if name.lower() not in _LEVELS:
        raise ConfigError(f"SLUICE_LOG: got {name!r}, expected one of {', '.join(_LEVELS)}")
    LOGGER.setLevel(name.upper())
    if not any(type(handler) is logging.StreamHandler for handler in LOGGER.handlers):
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("sluice %(levelname)s: %(message)s"))
        LOGGER.addHandler(handler)


def tell(text: str) -> None:
    """Says what was decided for the user: to `logging` where INFO is heard, else a line on stderr.

    `HF_HUB_DISABLE_PROGRESS_BARS` keeps it off stderr.
    """
    if LOGGER.isEnabledFor(logging.INFO) or bars_disabled():
        LOGGER.info("%s", text)
    else:
        sys.stderr.write(f"sluice: {text}\n")


def pull() -> None:
    """Hands the core's records to `logging`."""
    for _time_s, level, text in _core.drain_log():
        LOGGER.log(level, "%s", text)
