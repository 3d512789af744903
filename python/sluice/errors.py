"""The errors of sluice. Each is a `SluiceError` and the built-in class a caller would expect.

A message says what failed, what was got, what was expected, and what to do.
"""

from __future__ import annotations

from sluice._core import (
    CapacityError,
    CheckpointError,
    ConfigError,
    DeviceError,
    InternalError,
    IoError,
    SluiceError,
)


class UnsupportedModelError(SluiceError, NotImplementedError):
    """A model or layer that sluice refuses; the message names its class and what to do instead."""


__all__ = [
    "CapacityError",
    "CheckpointError",
    "ConfigError",
    "DeviceError",
    "InternalError",
    "IoError",
    "SluiceError",
    "UnsupportedModelError",
]
