"""The verbs: offload a model, give it back, or load one offloaded."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sluice.config import OffloadOptions
from sluice.errors import ConfigError

if TYPE_CHECKING:
    from sluice.session import Session


def offload(model: Any, *, options: OffloadOptions | None = None, **fields: Any) -> Session:
    """Runs a built model's experts through a bounded pool of slots.

    The experts move to disk, or to where they are in RAM (`backing="ram"`); everything else of the
    model is untouched and `restore` undoes it exactly. Slots are memory of the device that the
    model lies on, the CPU or one GPU. The session is also a context manager that restores at its
    end, and lives in `model.sluice`.

    Args:
        model: A transformers model in eval mode, built or loaded.
        options: All settings in one object, or none and
        fields: those of `OffloadOptions`; `device_memory` is required.

    Raises:
        ConfigError: Settings that cannot work, or a model that is offloaded already.
        UnsupportedModelError: Experts that sluice cannot place, by name.
        CapacityError: A budget below one slot of each size, naming those that work.

    Example:
        with sluice.offload(model, device_memory="25%") as session:
            model.generate(**inputs)
            print(session.report())
    """
    from sluice.hf import compat, describe, inplace

    compat.version()
    if options is not None and fields:
        raise ConfigError(
            f"offload: got options= and also {', '.join(sorted(fields))}, expected one of the two; "
            "put the fields into OffloadOptions"
        )
    if options is None and fields.get("device_memory") is None:
        checked = OffloadOptions.from_dict({**fields, "device_memory": "100%"})
        survey = inplace.survey_model(model, checked.exclude, checked.strict)
        raise describe.missing_budget(model, survey.sites)
    options = options or OffloadOptions.from_dict(fields)
    survey = inplace.survey_model(model, options.exclude, options.strict)
    return inplace.offload_model(model, survey, options)


def restore(model: Any) -> None:
    """Gives a model its own experts back, bit-equal, and closes its session.

    Args:
        model: One that `offload`, `from_pretrained` or `OffloadConfig` made.

    Raises:
        ConfigError: It is not offloaded.
        CapacityError: RAM does not suffice for all experts; the model stays offloaded.
    """
    from sluice.hf.restore import restore_model

    restore_model(model)


def from_pretrained(cls: Any, model_id: Any, *, offload: Any = None, **hf_kwargs: Any) -> Any:
    """`cls.from_pretrained(model_id, …)` with the experts left where they are.

    Args:
        cls: A transformers model class, such as `AutoModelForCausalLM`.
        model_id: A checkpoint folder or an id.
        offload: An `OffloadConfig`, an `OffloadOptions`, or their fields in a dict.
        hf_kwargs: Handed on.

    Returns:
        The model, with its session in `model.sluice`.

    Raises:
        UnsupportedModelError: The checkpoint is quantised already, or its experts are of no known
            structure.
        ConfigError: No budget; the message has a table for this model.
        CheckpointError: The checkpoint misses an expert or lies about one.
    """
    from sluice.hf import compat, describe
    from sluice.hf.quantizer import OffloadConfig

    compat.version()
    if hf_kwargs.get("quantization_config") is not None:
        raise ConfigError(
            "from_pretrained: got quantization_config= beside offload=, expected one of the two"
        )
    if isinstance(offload, OffloadOptions):
        offload = OffloadConfig.from_options(offload)
    elif offload is None or isinstance(offload, dict):
        offload = OffloadConfig(**(offload or {}))
    elif not isinstance(offload, OffloadConfig):
        raise ConfigError(
            f"offload: got {type(offload).__name__}, expected OffloadConfig, OffloadOptions or "
            "their fields in a dict"
        )
    config = hf_kwargs.get("config") or describe.load_config(model_id, hf_kwargs)
    describe.refuse_quantised(config, str(model_id))
    return cls.from_pretrained(model_id, quantization_config=offload, **hf_kwargs)
