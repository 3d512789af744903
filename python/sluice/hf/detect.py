"""Finds the experts of a model by structure, never by class name or config field.

A site is the one module of an MoE layer that sluice replaces. What looks like experts and is not a
site is refused by name, so a family that changed its code cannot end up silently resident.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

from sluice.errors import ConfigError, UnsupportedModelError
from sluice.hf import compat
from sluice.hf.site import ExpertSite

_LEAST_COVERAGE = 0.95


@dataclass(frozen=True, slots=True)
class Suspect:
    """A module that may be experts and is no site."""

    name: str
    module: nn.Module
    num_bytes: int
    reason: str

    @property
    def is_named_so(self) -> bool:
        """Whether its path or its class says "expert"."""
        return "expert" in f"{self.name} {type(self.module).__name__}".lower()


@dataclass(frozen=True, slots=True)
class Survey:
    """What a model's experts are: sites, and modules that only `strict=False` lets pass."""

    sites: tuple[ExpertSite, ...]
    left_resident: tuple[str, ...]


def find_expert_sites(
    model: nn.Module, *, exclude: Iterable[str] = (), strict: bool = True
) -> list[ExpertSite]:
    """The sites alone of `survey_experts`."""
    return list(survey_experts(model, exclude=exclude, strict=strict).sites)


def survey_experts(model: nn.Module, *, exclude: Iterable[str] = (), strict: bool = True) -> Survey:
    """The sites of a model, in the order of its modules; works on the meta device.

    Args:
        model: Any module; names in the result are paths in it.
        exclude: Regular expressions; modules whose path one of them finds are left alone.
        strict: Refuse a model in which anything that looks like experts is no site.

    Raises:
        UnsupportedModelError: No site at all, or (strict) experts that no site covers.
        ConfigError: An `exclude` pattern that is not a regular expression.
    """
    patterns = _compile(exclude)
    sites: list[ExpertSite] = []
    suspects: list[Suspect] = []
    taken: list[str] = []
    for name, module in model.named_modules():
        if any(pattern.search(name) for pattern in patterns):
            continue
        if any(name == path or name.startswith(path + ".") for path in taken):
            continue
        site, reason = _examine(name, module)
        if site is not None:
            sites.append(site)
            taken.append(name)
        elif (likely := _looks_like_experts(name, module)) and not _is_resident(module):
            suspects.append(Suspect(name, module, likely, reason))
            taken.append(name)
    _judge(model, sites, suspects, strict)
    return Survey(tuple(sites), tuple(suspect.name for suspect in suspects))


def _examine(name: str, module: nn.Module) -> tuple[ExpertSite | None, str]:
    """The site that a module is, or why it is none."""
    own = dict(module.named_parameters(recurse=False))
    first = "gate_up_proj" if "gate_up_proj" in own else "up_proj"
    if "down_proj" not in own or first not in own:
        return None, "no 3-D gate_up_proj or up_proj beside a down_proj"
    biases = {f"{first}_bias", "down_proj_bias"}
    strangers = own.keys() - {first, "down_proj"} - biases
    if strangers:
        return None, f"parameters that experts do not have: {', '.join(sorted(strangers))}"
    if own[first].ndim != 3 or own["down_proj"].ndim != 3:
        return None, f"{first} {list(own[first].shape)} is not 3-D"
    reason = _not_decorated(module)
    if reason:
        return None, reason
    flags = {flag: getattr(module, flag, value) for flag, value in compat.EXPERT_FLAGS.items()}
    for flag, default in compat.unknown_decorator_flags().items():
        if getattr(module, flag, default) != default:
            return None, f"decorator flag {flag}={getattr(module, flag)!r} is unknown"
    up, down = tuple(own[first].shape), tuple(own["down_proj"].shape)
    if flags["is_transposed"]:
        up, down = (up[0], up[2], up[1]), (down[0], down[2], down[1])
    experts, hidden, intermediate = down
    rows = (2 if flags["has_gate"] else 1) * intermediate
    if up != (experts, rows, hidden):
        return None, f"{first} {list(own[first].shape)} and down_proj {list(down)} do not fit"
    if flags["has_bias"] != (own.keys() >= biases) or (
        not flags["has_bias"] and own.keys() & biases
    ):
        return None, f"has_bias={flags['has_bias']}, but parameters are {', '.join(sorted(own))}"
    if flags["has_bias"] and (
        tuple(own[f"{first}_bias"].shape) != (experts, rows)
        or tuple(own["down_proj_bias"].shape) != (experts, hidden)
    ):
        return None, "biases do not fit the matrices"
    return ExpertSite(
        name=name,
        module=module,
        num_experts=experts,
        hidden=hidden,
        intermediate=intermediate,
        gated=flags["has_gate"],
        has_bias=flags["has_bias"],
        transposed=flags["is_transposed"],
        concatenated=flags["is_concatenated"],
        has_post_norm=flags["has_post_expert_norm"],
    ), ""


def _not_decorated(module: nn.Module) -> str:
    """Why transformers' experts interface does not govern this module; "" when it does."""
    forward: Any = type(module).forward  # the instance's may be a hook
    if not hasattr(forward, "__wrapped__"):
        return "its class is not decorated with use_experts_implementation"
    if not all(hasattr(module, flag) for flag in ("has_gate", "has_bias", "is_transposed")):
        return "the decorator's flags are missing"
    parameters = list(inspect.signature(forward.__wrapped__).parameters.values())
    positional = [p for p in parameters if p.kind is not inspect.Parameter.VAR_KEYWORD]
    if len(positional) != 4:
        names = ", ".join(p.name for p in parameters[1:])
        return f"forward takes ({names}), expected hidden states, ids and weights"
    return ""


def _looks_like_experts(name: str, module: nn.Module) -> int:
    """Bytes of what may be experts in this module; 0 when it is something else.

    Names serve to refuse here, never to accept.
    """
    if isinstance(module, nn.modules.conv._ConvNd):  # pyright: ignore[reportPrivateUsage]
        return 0
    stacked = sum(
        p.numel() * p.element_size()
        for p in module.parameters(recurse=False)
        if p.ndim >= 3 and min(p.shape[0], p.shape[-1], p.shape[-2]) > 1
    )
    if stacked:
        return stacked
    if name.rpartition(".")[2] == "experts" or isinstance(module, nn.ModuleDict | nn.ModuleList):
        children = list(module.children())
        is_bank = len(children) > 1 and len({type(child) for child in children}) == 1
        named = "expert" in type(module).__name__.lower() or name.endswith("experts")
        if named and (is_bank or any(True for _ in module.parameters())):
            return sum(p.numel() * p.element_size() for p in module.parameters())
    return 0


def _is_resident(module: nn.Module) -> bool:
    """Inkling's shared experts: three 3-D matrices that every token uses, so they stay."""
    own = {name for name, _ in module.named_parameters(recurse=False)}
    return own == {"gate_proj", "up_proj", "down_proj"} and "Shared" in type(module).__name__


def _judge(
    model: nn.Module, sites: list[ExpertSite], suspects: list[Suspect], strict: bool
) -> None:
    kind = type(model).__name__
    covered = sum(site.weight_bytes for site in sites)
    left = sum(suspect.num_bytes for suspect in suspects)
    suspects.sort(key=lambda suspect: not suspect.is_named_so)
    too_little = covered < _LEAST_COVERAGE * (covered + left)
    if suspects and (not sites or (strict and (suspects[0].is_named_so or too_little))):
        first = suspects[0]
        raise UnsupportedModelError(
            f"{kind}: {first.name} ({type(first.module).__name__}) looks like experts, but "
            f"{first.reason} (transformers {compat.version()}; sluice covers {covered} of "
            f"{covered + left} expert bytes, expected {_LEAST_COVERAGE:.0%}); name it in exclude= "
            "to leave it resident"
        )
    if not sites:
        raise UnsupportedModelError(
            f"{kind}: got no experts that sluice can place (transformers {compat.version()}), "
            "expected modules decorated with use_experts_implementation that own 3-D gate_up_proj "
            "(or up_proj) and down_proj; is this a mixture-of-experts model?"
        )


def _compile(exclude: Iterable[str]) -> list[re.Pattern[str]]:
    patterns: list[re.Pattern[str]] = []
    for text in exclude:
        try:
            patterns.append(re.compile(text))
        except re.error as error:
            raise ConfigError(
                f"exclude: got {text!r}, expected a regular expression ({error}); escape it"
            ) from error
    return patterns


def owners_of_experts(sites: Iterable[ExpertSite]) -> Iterator[object]:
    """Every config that one of the sites reads its implementation from, each once."""
    seen: set[int] = set()
    for site in sites:
        config = getattr(site.module, "config", None)
        if config is not None and id(config) not in seen:
            seen.add(id(config))
            yield config
