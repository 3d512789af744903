"""From a scanned class to something that runs: an experts module, or a whole causal LM.

The generic builder goes first; the zoo's kwargs serve a family where its result raises, is larger
than a megabyte, or has no expert in it. Everything is seeded.
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from . import zoo
from .scan import DecoratedClass, scan
from .small_config import TOP_K, small_config, small_fields

MAX_MODEL_BYTES = 1_000_000
ROUTER_SCALE = 50.0  # decisive: rounding must not change which experts are chosen
HEAD_SPREAD = 2.0  # decisive too: rows of the head differ in norm, so top-2 margins are wide
PROMPT = (2, 6)
_ROUTERS = ("gate", "router")
_CORRECTIONS = ("e_score_correction_bias", "expert_bias", "correction_bias", "balancing_biases")


@dataclass(frozen=True, slots=True)
class Built:
    """A whole tiny model in fp32, in eval mode, with decisive routers and experts that matter.

    Attributes:
        name: The family's, or a zoo variant's.
        model: The model itself; copy it before changing it.
        source: "generic" or "zoo".
        sites: Names of its experts modules.
        generic_error: Why the generic builder did not serve, if it did not.
    """

    name: str
    model: nn.Module
    source: str
    sites: tuple[str, ...]
    generic_error: str = ""

    @property
    def vocab_size(self) -> int:
        return self.model.get_input_embeddings().weight.shape[0]


class BuildError(AssertionError):
    """A family the battery has no working tiny model for."""


def model_class(entry: DecoratedClass) -> type[nn.Module]:
    assert entry.causal_lm is not None
    return getattr(importlib.import_module(entry.module), entry.causal_lm)


def experts_class(entry: DecoratedClass) -> type[nn.Module]:
    return getattr(importlib.import_module(entry.module), entry.name)


def causal_families() -> tuple[DecoratedClass, ...]:
    """One entry per family that has a causal LM."""
    first = {entry.family: entry for entry in reversed(scan()) if entry.causal_lm}
    return tuple(first[name] for name in sorted(first))


def build_family(entry: DecoratedClass) -> Built:
    """The family's tiny model. Raises: BuildError with both errors."""
    cls = model_class(entry)
    try:
        return _checked(entry.family, cls, small_config(cls.config_class), "generic")
    except Exception as error:
        generic_error = one_line(error)
    for tiny in zoo.CAUSAL_LMS:
        if tiny.config == cls.config_class.__name__ and not tiny.variant:
            config = cls.config_class(**tiny.full_kwargs())
            built = _checked(entry.family, cls, config, "zoo")
            return dataclasses.replace(built, generic_error=generic_error)
    raise BuildError(f"{entry.family}: {generic_error}; the zoo has no {cls.config_class.__name__}")


def build_zoo(tiny: zoo.ZooModel) -> Built:
    """One zoo model, as `build_family` would give it."""
    config_class, cls = zoo_classes(tiny)
    return _checked(tiny.name, cls, config_class(**tiny.full_kwargs()), "zoo")


def zoo_classes(tiny: zoo.ZooModel) -> tuple[type, type[nn.Module]]:
    import transformers

    config_class = getattr(transformers, tiny.config)
    modeling = config_class.__module__.replace(".configuration_", ".modeling_")
    return config_class, getattr(importlib.import_module(modeling), tiny.model)


def present(models: Iterable[zoo.ZooModel], *, decorated: bool) -> list[zoo.ZooModel]:
    """Those that this transformers has, with experts behind the interface or without."""
    import transformers

    modules = {entry.module for entry in scan()}
    return [
        tiny
        for tiny in models
        if hasattr(transformers, tiny.config)
        and (zoo_classes(tiny)[1].__module__ in modules) is decorated
    ]


def build_experts(entry: DecoratedClass, dtype: torch.dtype) -> nn.Module:
    """The experts module alone, from the family's small config, random weights.

    Its children with parameters (Muse Spark's norm) are random too, so that they matter.
    """
    cls = experts_class(entry)
    torch.manual_seed(0)
    config = _experts_config(entry)
    config._experts_implementation = "eager"
    module = cls(config, *_extra_arguments(entry, config)).eval()
    randomise_experts(module)
    for child in module.children():
        for parameter in child.parameters():
            nn.init.uniform_(parameter, 0.5, 1.5)
    return module.to(dtype)


def randomise_experts(module: nn.Module) -> None:
    """Weights of unit gain, so that a wrong expert shows; no projection is symmetric in anything.

    A model's own init (σ = 0.02) leaves the experts' part of the residual below bf16's rounding.
    """
    for name, parameter in module.named_parameters(recurse=False):
        transposed = bool(getattr(module, "is_transposed", False))
        fan_in = parameter.shape[-2 if transposed else -1] if parameter.dim() == 3 else 4
        nn.init.normal_(parameter, std=1.0 / math.sqrt(fan_in))
        assert parameter.dim() in (2, 3), f"{name}: got {parameter.dim()} dimensions"


def site_names(model: nn.Module) -> tuple[str, ...]:
    """Names of the modules whose class the scan found decorated."""
    decorated = {(entry.module, entry.name) for entry in scan()}
    return tuple(
        name
        for name, module in model.named_modules()
        if (type(module).__module__, type(module).__name__) in decorated
    )


def prompt_ids(built: Built, batch: int = PROMPT[0], length: int = PROMPT[1]) -> torch.Tensor:
    generator = torch.Generator().manual_seed(7)
    return torch.randint(3, built.vocab_size, (batch, length), generator=generator)


def one_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]


def _checked(name: str, cls: type[nn.Module], config: Any, source: str) -> Built:
    torch.manual_seed(0)
    model = cls._from_config(config, attn_implementation="eager").eval()
    sites = site_names(model)
    nbytes = sum(p.numel() * p.element_size() for p in model.parameters())
    if nbytes > MAX_MODEL_BYTES:
        raise BuildError(f"{name}: got {nbytes} bytes, expected at most {MAX_MODEL_BYTES}")
    if not sites:
        raise BuildError(f"{name}: no decorated experts in the small model")
    with torch.no_grad():
        _make_decisive(model, sites)
        built = Built(name=name, model=model, source=source, sites=sites)
        ids = prompt_ids(built)
        logits = model(ids).logits
        model.generate(ids, max_new_tokens=2, do_sample=False)
    if not bool(logits.isfinite().all()):
        raise BuildError(f"{name}: logits are not finite")
    return built


def _make_decisive(model: nn.Module, sites: tuple[str, ...]) -> None:
    head = model.get_output_embeddings().weight
    head.mul_(torch.exp(HEAD_SPREAD * torch.randn(head.shape[0], 1)))
    for site in sites:
        experts = model.get_submodule(site)
        randomise_experts(experts)
        num_experts = experts.down_proj.shape[0]
        block = model.get_submodule(site.rpartition(".")[0])
        for router in (getattr(block, name, None) for name in _ROUTERS):
            for parameter in router.parameters() if router is not None else ():
                if parameter.dim() == 2 and num_experts <= parameter.shape[0] <= num_experts + 1:
                    parameter.mul_(ROUTER_SCALE)
        for name, tensor in [*block.named_parameters(), *block.named_buffers()]:
            if name.rpartition(".")[2] in _CORRECTIONS:
                tensor.copy_(torch.rand(tensor.shape).to(tensor.dtype))


def _experts_config(entry: DecoratedClass) -> Any:
    """The family's config that has what the class reads, shrunk; the zoo's where rules fail."""
    stem = entry.module.rpartition(".")[0]
    name = entry.module.rpartition(".")[2].replace("modeling_", "configuration_", 1)
    configuration = importlib.import_module(f"{stem}.{name}")
    errors: list[str] = []
    for cls in _config_classes(configuration, entry):
        kwargs = [small_fields(cls)]
        kwargs += [t.full_kwargs() for t in _zoo_models() if t.config == cls.__name__]
        for fields in kwargs:
            try:
                config = cls(**fields)
            except Exception as error:
                errors.append(f"{cls.__name__}: {one_line(error)}")
                continue
            if all(hasattr(config, attribute) for attribute in entry.config_reads):
                return config
            errors.append(f"{cls.__name__}: lacks some of {entry.config_reads}")
    raise BuildError(f"{entry.key}: no small config: {'; '.join(errors)}")


def _config_classes(configuration: Any, entry: DecoratedClass) -> list[type]:
    """Config classes of the family's file, those of text models first."""
    from transformers import PreTrainedConfig

    classes = [
        value
        for value in vars(configuration).values()
        if inspect.isclass(value)
        and issubclass(value, PreTrainedConfig)
        and value.__module__ == configuration.__name__
    ]
    talker = "Talker" in entry.name
    order = sorted(
        classes, key=lambda c: (("Talker" in c.__name__) != talker, "Text" not in c.__name__)
    )
    return order or [model_class(entry).config_class]


def _zoo_models() -> tuple[zoo.ZooModel, ...]:
    return zoo.CAUSAL_LMS + zoo.TEXT_MODELS


def _extra_arguments(entry: DecoratedClass, config: Any) -> list[Any]:
    """Arguments of the class's `__init__` after `config`: widths, so far (Ernie-4.5-VL)."""
    values = {"intermediate_size": 24, "layer_idx": 0, "top_k": TOP_K}
    return [values[name] for name in entry.init_args[1:]]
