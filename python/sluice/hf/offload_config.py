"""The settings as transformers passes them around: `quantization_config=OffloadConfig(...)`."""

from __future__ import annotations

import dataclasses
import logging
from typing import Any

from transformers.utils.quantization_config import QuantizationConfigMixin

from sluice.config import OffloadOptions
from sluice.errors import ConfigError

METHOD = "sluice_offload"
_FIELDS = tuple(field.name for field in dataclasses.fields(OffloadOptions))
_log = logging.getLogger("sluice")


class OffloadConfig(QuantizationConfigMixin):
    """`OffloadOptions` as transformers wants to see them.

    Args:
        quant_method: Set by transformers when it reads a config back.
        fields: Those of `OffloadOptions`, refused when unknown. Without `device_memory` loading
            fails with a table of budgets for that very model.

    Raises:
        ConfigError: A field that is unknown, or a value that can never work.
    """

    def __init__(self, *, quant_method: str = METHOD, **fields: Any) -> None:
        if quant_method != METHOD:
            raise ConfigError(f"quant_method: got {quant_method!r}, expected {METHOD!r}")
        self.quant_method = METHOD  # type: ignore[assignment]
        self._set(fields)

    @classmethod
    def from_options(cls, options: OffloadOptions) -> OffloadConfig:
        """The same settings."""
        return cls(**_fields_of(options))

    @classmethod
    def from_dict(  # type: ignore[override]
        cls, config_dict: dict[str, Any], return_unused_kwargs: bool = False, **kwargs: Any
    ) -> Any:
        """Reads what `to_dict` wrote; fields of a newer sluice are left out with a warning."""
        known = {k: v for k, v in config_dict.items() if k in _FIELDS or k == "quant_method"}
        if newer := sorted(config_dict.keys() - known.keys()):
            _log.warning("OffloadConfig: fields of a newer sluice are ignored: %s", newer)
        config = cls(**known)
        unused = config.update(**kwargs)
        return (config, unused) if return_unused_kwargs else config

    @property
    def options(self) -> OffloadOptions:
        """The settings, frozen. ConfigError while `device_memory` is missing."""
        if self._options is None:
            raise ConfigError(
                "device_memory: got nothing, expected bytes, a size like '12GiB' or a share like "
                "'25%' of the experts; `sluice plan MODEL` shows what budgets buy"
            )
        return self._options

    @property
    def is_complete(self) -> bool:
        """Whether `device_memory` was given."""
        return self._options is not None

    def update(self, **kwargs: Any) -> dict[str, Any]:
        """Changes fields, all or none; gives back what is none of ours."""
        mine = {key: value for key, value in kwargs.items() if key in _FIELDS}
        self._set({**self._fields, **mine})
        return {key: value for key, value in kwargs.items() if key not in mine}

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as JSON holds them."""
        held = self._fields if self._options is None else _fields_of(self._options)
        values = {k: list(v) if isinstance(v, tuple) else v for k, v in held.items()}
        return {
            "quant_method": METHOD,
            **{k: v if _is_plain(v) else str(v) for k, v in values.items()},
        }

    def __iter__(self) -> Any:
        yield from self.to_dict().items()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, OffloadConfig) and self.to_dict() == other.to_dict()

    __hash__ = None  # type: ignore[assignment]

    def __getattr__(self, name: str) -> Any:
        if name in _FIELDS:
            held = self.__dict__.get("_options")
            return getattr(held, name) if held else self.__dict__["_fields"].get(name)
        raise AttributeError(f"OffloadConfig has no {name}; its fields are {', '.join(_FIELDS)}")

    def _set(self, given: dict[str, Any]) -> None:
        fields: dict[str, Any] = {}
        for key, value in given.items():
            fields[key] = tuple(value) if isinstance(value, list) else value
        if fields.get("device_memory") is None:
            self.filters = OffloadOptions.from_dict({**fields, "device_memory": "100%"})
            self._options = None
        else:
            self._options = self.filters = OffloadOptions.from_dict(fields)
        self._fields = fields


def _fields_of(options: OffloadOptions) -> dict[str, Any]:
    return {name: getattr(options, name) for name in _FIELDS}


def _is_plain(value: Any) -> bool:
    return value is None or isinstance(value, str | int | float | bool | list)
