"""What sluice needs of transformers beyond its public names, in one file.

Nothing else in this room reads transformers' version or imports a private module, so a release that
moves something is repaired here. Capabilities are found by looking (signatures, attributes), not by
comparing versions; the window is checked once, loudly.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator
from copy import deepcopy
from functools import lru_cache
from typing import Any

from sluice.errors import ConfigError

SUPPORTED = ">=5.13.1,<6"
_FLOOR = (5, 13, 1)
_CEILING = (6,)

# The decorator's flags that the engine understands, with the values it has when it says nothing.
EXPERT_FLAGS: dict[str, bool] = {
    "has_gate": True,
    "has_bias": False,
    "is_transposed": False,
    "is_concatenated": True,
    "has_post_expert_norm": False,
}
_DECORATOR_PLUMBING = {"experts_class", "experts_interface"}


@lru_cache(maxsize=1)
def version() -> str:
    """The installed transformers, inside the window.

    Raises:
        ConfigError: not installed, or outside of the window.
    """
    try:
        import transformers
    except ImportError as error:
        raise ConfigError(
            "transformers: not installed, expected " + SUPPORTED + "; pip install 'sluice[hf]'"
        ) from error
    numbers = tuple(int(part) for part in re.findall(r"\d+", transformers.__version__)[:3])
    if not _FLOOR <= numbers < _CEILING:
        raise ConfigError(
            f"transformers: got {transformers.__version__}, expected {SUPPORTED}; "
            "pip install 'sluice[hf]'"
        )
    return transformers.__version__


@lru_cache(maxsize=1)
def unknown_decorator_flags() -> dict[str, Any]:
    """Flags of `use_experts_implementation` that are not in `EXPERT_FLAGS`, with their defaults."""
    from transformers.integrations.moe import use_experts_implementation

    parameters = inspect.signature(use_experts_implementation).parameters
    known = EXPERT_FLAGS.keys() | _DECORATOR_PLUMBING
    return {name: p.default for name, p in parameters.items() if name not in known}


def experts_functions() -> Any:
    """The registry of experts implementations, looked up by transformers at every call."""
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    return ALL_EXPERTS_FUNCTIONS


def register_experts_function(name: str) -> None:
    """Registers `name` as "the class's own eager body"; twice is once.

    Layers that `exclude=` left out share their config with offloaded ones and land here.
    """
    registry = experts_functions()
    if name not in registry:
        registry[name] = run_eager_body


def run_eager_body(module: Any, *args: Any, **kwargs: Any) -> Any:
    """Calls the forward that the experts class was written with."""
    return type(module).forward.__wrapped__(module, *args, **kwargs)


class Conversion:
    """transformers' own mapping from checkpoint keys to parameters, for one model on meta.

    Made while the model still has all its expert parameters: the mapping asks for their names.
    """

    def __init__(self, model: Any) -> None:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming

        mapping: list[Any] = deepcopy(get_model_conversion_mapping(model))
        self._model = model
        self._meta: dict[str, Any] = model.state_dict()
        self._renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
        self._converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
        self._owners = {p: entry for entry in self._converters for p in entry.source_patterns}

    def target_of(self, key: str) -> tuple[str, str | None]:
        """The parameter that a checkpoint key belongs to, and the converter's source pattern."""
        target, pattern = self._rename(key, self._renamings, self._converters)
        if target not in self._meta and key in self._meta:
            target, pattern = self._rename(key, [], [])
        return target, pattern

    def index_of(self, key: str, pattern: str) -> int | None:
        """The integer that stands where `pattern` has its `*`; None when it has none."""
        if "*" not in pattern:
            return None
        renamed, _ = self._rename(key, self._renamings, [])
        star = pattern.removeprefix("^").replace("*", r"(?P<index>\d+)", 1)
        match = re.search(star, renamed)
        return int(match["index"]) if match else None

    def converter_of(self, pattern: str) -> Any:
        """The converter that owns a source pattern; it is never run itself, only copies are."""
        return self._owners[pattern]

    def convert(
        self, target: str, converter: Any, sources: list[tuple[str, str, Callable[[], Any]]]
    ) -> dict[str, Any]:
        """Runs a copy of a converter on the CPU as transformers would.

        Sources are (key, pattern, load), in the order of experts.
        """
        converter = deepcopy(converter)
        for key, pattern, load in sources:
            converter.add_tensor(target, key, pattern, load)
        converted = converter.convert(target, model=self._model, config=self._model.config)
        return {
            name: value[0] if isinstance(value, list) else value
            for name, value in converted.items()
        }

    def _rename(
        self, key: str, renamings: list[Any], converters: list[Any]
    ) -> tuple[str, str | None]:
        from transformers.core_model_loading import rename_source_key

        prefix = self._model.base_model_prefix
        return rename_source_key(key, renamings, converters, prefix, self._meta)


def operation_names(converter: Any) -> list[tuple[str, dict[str, Any]]]:
    """The converter's chain as (class name, attributes), for recipes and cache keys."""
    return [(type(op).__name__, dict(vars(op))) for op in converter.operations]


def dtype_overrides(model: Any, dtype: Any) -> dict[str, Any]:
    """Patterns of parameters that transformers keeps in fp32 whatever `dtype` says."""
    plan = getattr(model, "_get_dtype_plan", None)
    return dict(plan(dtype)) if plan is not None else {}


def ignore_unexpected(model: Any, patterns: list[str]) -> None:
    """Tells the loader that keys matching `patterns` are left out on purpose."""
    held = getattr(model, "_keys_to_ignore_on_load_unexpected", None)
    if isinstance(held, set):
        model._keys_to_ignore_on_load_unexpected = held | set(patterns)
    else:
        model._keys_to_ignore_on_load_unexpected = [*(held or []), *patterns]


def sub_configs(config: Any) -> Iterator[Any]:
    """The config and every config nested in it, each once."""
    seen: set[int] = set()
    stack = [config]
    while stack:
        current = stack.pop()
        if id(current) in seen:
            continue
        seen.add(id(current))
        yield current
        names = getattr(current, "sub_configs", None) or {}
        stack.extend(
            nested for name in names if (nested := getattr(current, name, None)) is not None
        )


def experts_implementation(config: Any) -> Any:
    """The implementation chosen for the experts under this very config."""
    return getattr(config, "_experts_implementation_internal", None)


def set_experts_implementation(config: Any, name: Any) -> None:
    """Chooses it for this very config; saved configs do not carry it."""
    config._experts_implementation_internal = name


def forget_quantizer(model: Any, quantizer: Any) -> None:
    """Makes the loaded model an ordinary one again: castable, and saved without our method."""
    conversions = getattr(model, "_weight_conversions", None)
    quantizer.remove_quantization_config(model)
    if conversions is not None:
        model._weight_conversions = conversions
    for module in model.modules():
        config = getattr(module, "config", None)
        for nested in sub_configs(config) if hasattr(config, "to_dict") else ():
            nested.__dict__.pop("_is_quantized", None)


def casts_renamed_keys() -> bool:
    """Whether a quantizer that says "pre-quantized" still has every dense tensor cast.

    Releases without `get_new_dtype` leave renamed keys in the type of the file.
    """
    from transformers.quantizers import HfQuantizer  # pyright: ignore[reportPrivateImportUsage]

    return hasattr(HfQuantizer, "get_new_dtype")
