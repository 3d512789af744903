"""Path Q: `quantization_config=OffloadConfig(...)`, the way in that never holds all experts.

transformers calls the quantizer before loading, with the model on meta, and after it. Before, the
experts' bytes are found in the checkpoint's headers and their modules replaced, so that the loader
meets keys without a parameter and leaves them unread. After, the store is opened and the model
becomes an ordinary one again. Importing this file registers both classes, once; `import sluice`
does not import it.
"""

from __future__ import annotations

import dataclasses
import logging
import re
from collections.abc import Sequence
from typing import Any

from transformers.quantizers import (  # documented names; the package says so at run time only
    HfQuantizer,  # pyright: ignore[reportPrivateImportUsage]
    register_quantization_config,  # pyright: ignore[reportPrivateImportUsage]
    register_quantizer,  # pyright: ignore[reportPrivateImportUsage]
)
from transformers.utils.quantization_config import QuantizationConfigMixin

from sluice.config import OffloadOptions
from sluice.errors import ConfigError, UnsupportedModelError
from sluice.hf import compat, describe
from sluice.hf.attachment import Attachment
from sluice.hf.binding import open_session
from sluice.hf.detect import ExpertSite, survey_experts
from sluice.hf.plan import CheckpointPlan, plan_checkpoint
from sluice.hf.sources import open_experts

METHOD = "sluice_offload"
_FIELDS = tuple(field.name for field in dataclasses.fields(OffloadOptions))
_log = logging.getLogger("sluice")

compat.version()


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


class OffloadHfQuantizer(HfQuantizer):
    """The hooks of path Q. One instance per `from_pretrained`."""

    requires_calibration = False

    def __init__(self, config: OffloadConfig, **kwargs: Any) -> None:
        super().__init__(config, **kwargs)
        # transformers loads on one thread when it believes that we quantise as we load; on releases
        # where the other belief would cost the cast to `dtype=`, one thread it is.
        self.pre_quantized = compat.casts_renamed_keys()
        self._config = config
        self._attachment: Attachment | None = None
        self._plan: CheckpointPlan | None = None

    def validate_environment(self, *args: Any, device_map: Any = None, **kwargs: Any) -> None:
        """Refuses devices that this build cannot compute on."""
        compat.version()
        check_device_map(device_map)

    def _process_model_before_weight_loading(
        self, model: Any, checkpoint_files: Sequence[str] | None = None, **kwargs: Any
    ) -> None:
        if getattr(model.config, "distributed_config", None) is not None:
            raise UnsupportedModelError(
                f"{type(model).__name__}: got a distributed_config, but sluice does not offload "
                "sharded models yet; load without it"
            )
        if checkpoint_files is None:
            raise ConfigError(
                "quantization_config: got OffloadConfig without checkpoint files, expected a "
                "checkpoint; use sluice.offload(model) for a model that is built"
            )
        filters = self._config.filters
        survey = survey_experts(model, exclude=filters.exclude, strict=filters.strict)
        sites = survey.sites
        if not self._config.is_complete:
            raise describe.missing_budget(model, sites)
        self._plan = plan_checkpoint(model, sites, checkpoint_files)
        self._attachment = Attachment(model, survey)
        self._attachment.swap_in(model)
        compat.ignore_unexpected(model, _unexpected_patterns(model, sites))

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        attachment, plan = self._attachment, self._plan
        assert attachment is not None and plan is not None
        for site, module in zip(attachment.sites, attachment.modules, strict=True):
            if model.get_submodule(site.name) is not module:
                raise UnsupportedModelError(
                    f"{site.label}: got {type(model.get_submodule(site.name)).__name__} in its "
                    "place after loading, expected OffloadedExperts; another quantizer replaced it"
                )
        check_devices(model)
        store = open_experts(plan, self._config.options)
        session = open_session(store, self._config.options, attachment.sites)
        compat.forget_quantizer(model, self)
        attachment.bind(model, session, holding="checkpoint")
        experts = sum(site.num_experts for site in attachment.sites)
        _log.info(
            "%s: %d experts of %d layers, %s, budget %d bytes",
            type(model).__name__,
            experts,
            len(attachment.sites),
            store.description,
            session.budget_bytes,
        )
        return model

    def is_serializable(self, *args: Any, **kwargs: Any) -> bool:  # type: ignore[override]
        """The model is saved as what it was, never as "quantised"."""
        return False

    @property
    def is_trainable(self) -> bool:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Offloaded experts have no gradient."""
        return False

    @property
    def is_compileable(self) -> bool:
        """A captured graph would replay stale slots."""
        return False


register_quantization_config(METHOD)(OffloadConfig)
register_quantizer(METHOD)(OffloadHfQuantizer)


def check_device_map(device_map: Any) -> None:
    """Refuses a map that names an accelerator, before anything is loaded."""
    values = device_map.values() if isinstance(device_map, dict) else [device_map]
    for value in values:
        text = f"cuda:{value}" if isinstance(value, int) else str(value)
        if text.startswith(("cuda", "mps", "xpu")):
            raise UnsupportedModelError(
                f"device_map: got {text}, but this build of sluice keeps its slots on the CPU; use "
                "device_map='cpu'"
            )
        if text == "disk":
            _log.warning(
                "device_map: 'disk' is left to accelerate; sluice moves experts only, whatever the "
                "map says of them"
            )


def check_devices(model: Any) -> None:
    """Refuses a model that landed on an accelerator ("auto" on a machine with one)."""
    for device in {parameter.device for parameter in model.parameters()}:
        if device.type not in ("cpu", "meta"):
            raise UnsupportedModelError(
                f"{type(model).__name__}: got parameters on {device}, but this build of sluice "
                "keeps its slots on the CPU; load the model with device_map='cpu'"
            )


def _unexpected_patterns(model: Any, sites: Sequence[ExpertSite]) -> list[str]:
    """Exactly the sites' parameters, with or without the base model's prefix."""
    prefix = f"{model.base_model_prefix}." if model.base_model_prefix else ""
    return [
        rf"^(?:{re.escape(prefix)})?{re.escape(site.name.removeprefix(prefix))}\.{parameter}$"
        for site in sites
        for parameter in site.parameters.values()
    ]


def _fields_of(options: OffloadOptions) -> dict[str, Any]:
    return {name: getattr(options, name) for name in _FIELDS}


def _is_plain(value: Any) -> bool:
    return value is None or isinstance(value, str | int | float | bool | list)
