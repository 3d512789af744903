"""Path Q: `quantization_config=OffloadConfig(...)`, the way in that never holds all experts.

transformers calls the quantizer before loading, with the model on meta, and after it. Before, the
experts' bytes are found in the checkpoint's headers and their modules replaced, so that the loader
meets keys without a parameter and leaves them unread. After, the store is opened and the model
becomes an ordinary one again. Importing this file registers both classes, once; `import sluice`
does not import it.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from typing import Any

from transformers.quantizers import (  # documented names; the package says so at run time only
    HfQuantizer,  # pyright: ignore[reportPrivateImportUsage]
    register_quantization_config,  # pyright: ignore[reportPrivateImportUsage]
    register_quantizer,  # pyright: ignore[reportPrivateImportUsage]
)

from sluice.errors import ConfigError, UnsupportedModelError
from sluice.hf import compat, describe, devices, layout
from sluice.hf.attachment import Attachment
from sluice.hf.binding import open_session
from sluice.hf.checkpoint.open import open_experts
from sluice.hf.checkpoint.plan import CheckpointPlan, plan_checkpoint
from sluice.hf.detect import survey_experts
from sluice.hf.offload_config import METHOD, OffloadConfig
from sluice.hf.site import ExpertSite

_log = logging.getLogger("sluice")

compat.version()


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
        devices.check_device_map(device_map)

    def adjust_max_memory(self, max_memory: dict[str, Any]) -> dict[str, Any]:
        """What `device_map="auto"` may give to the rest of the model: the slots are taken off."""
        if self._plan is None:
            return max_memory
        left = dict(max_memory)
        # Where the slots will be: on the one GPU that may be used, else in RAM.
        gpus = [key for key in left if key not in ("cpu", "disk")]
        place = gpus[0] if len(gpus) == 1 else "cpu"
        if isinstance(left.get(place), int | float):
            everything = sum(
                p.site.num_experts * layout.slot_bytes(p.site, p.stored) for p in self._plan.sites
            )
            slots = min(self._config.options.budget_bytes(everything), everything)
            left[place] = max(0, left[place] - slots)
        return left

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
        device = devices.device_of(model)
        store = open_experts(plan, self._config.options)
        session = open_session(store, self._config.options, attachment.sites, device)
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


def _unexpected_patterns(model: Any, sites: Sequence[ExpertSite]) -> list[str]:
    """Exactly the sites' parameters, with or without the base model's prefix."""
    prefix = f"{model.base_model_prefix}." if model.base_model_prefix else ""
    return [
        rf"^(?:{re.escape(prefix)})?{re.escape(site.name.removeprefix(prefix))}\.{parameter}$"
        for site in sites
        for parameter in site.parameters.values()
    ]
