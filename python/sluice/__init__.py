"""sluice: Mixture-of-Experts models in less memory than they have.

    with sluice.offload(model, device_memory="25%") as session:
        model.generate(**inputs)
        print(session.report())

Importing this package imports neither torch nor transformers, patches nothing and starts nothing:
the names below load what they need when they are first asked for.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sluice.api import from_pretrained as from_pretrained
    from sluice.api import offload as offload
    from sluice.api import restore as restore
    from sluice.config import OffloadOptions as OffloadOptions
    from sluice.errors import CapacityError as CapacityError
    from sluice.errors import CheckpointError as CheckpointError
    from sluice.errors import ConfigError as ConfigError
    from sluice.errors import DeviceError as DeviceError
    from sluice.errors import InternalError as InternalError
    from sluice.errors import IoError as IoError
    from sluice.errors import SluiceError as SluiceError
    from sluice.errors import UnsupportedModelError as UnsupportedModelError
    from sluice.hf.quantizer import OffloadConfig as OffloadConfig
    from sluice.reference import reference_model as reference_model
    from sluice.session import Session as Session
    from sluice.stats import Stats as Stats

    __version__: str

_HOMES = {
    "offload": "sluice.api",
    "restore": "sluice.api",
    "from_pretrained": "sluice.api",
    "reference_model": "sluice.reference",
    "OffloadConfig": "sluice.hf.quantizer",
    "OffloadOptions": "sluice.config",
    "Session": "sluice.session",
    "Stats": "sluice.stats",
    "SluiceError": "sluice.errors",
    "ConfigError": "sluice.errors",
    "UnsupportedModelError": "sluice.errors",
    "CheckpointError": "sluice.errors",
    "IoError": "sluice.errors",
    "CapacityError": "sluice.errors",
    "DeviceError": "sluice.errors",
    "InternalError": "sluice.errors",
}

__all__ = [
    "CapacityError",
    "CheckpointError",
    "ConfigError",
    "DeviceError",
    "InternalError",
    "IoError",
    "OffloadConfig",
    "OffloadOptions",
    "Session",
    "SluiceError",
    "Stats",
    "UnsupportedModelError",
    "__version__",
    "from_pretrained",
    "offload",
    "reference_model",
    "restore",
]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from sluice._core import version

        return version()
    if name not in _HOMES:
        raise AttributeError(f"module 'sluice' has no attribute '{name}'")
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value  # the next look-up does not come here
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
