"""Logging: silent until the user's program, or SLUICE_LOG, asks for it.

The core writes its records into a ring; they are pulled from Python, so that no worker thread ever
waits for the interpreter.
"""

from __future__ import annotations

import logging
import os

from sluice import _core
from sluice.errors import ConfigError

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


def pull() -> None:
    """Hands the core's records to `logging`."""
    for _time_s, level, text in _core.drain_log():
        LOGGER.log(level, "%s", text)
