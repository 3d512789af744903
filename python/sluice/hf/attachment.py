"""What sluice changes on a model, in one object that undoes all of it.

The swap of modules, the experts implementation in the configs, the lock against compiled decoding
and five methods wrapped on the instance. Nothing of torch, of transformers or of a class is
patched. The model owns the attachment and the session; neither owns the model.
"""

from __future__ import annotations

import functools
import weakref
from contextlib import contextmanager
from typing import Any, cast

from torch import nn

from sluice.config import PRESETS
from sluice.errors import UnsupportedModelError
from sluice.hf import compat
from sluice.hf.detect import Survey, owners_of_experts
from sluice.hf.experts import OffloadedExperts
from sluice.hf.tap import Tap

_ATTRIBUTE = "_sluice_attachment"
IMPLEMENTATION = "sluice"
_WRAPPED = ("get_memory_footprint", "num_parameters", "save_pretrained", "generate", "_apply")


class Attachment:
    """The sites of one model while they are offloaded.

    Args:
        model: The model.
        survey: Its sites.
        home: Where the experts go back to: "cpu" or "cuda:N". A model that moves takes it along.
    """

    def __init__(self, model: nn.Module, survey: Survey, home: str = "cpu") -> None:
        self.home = home
        self.sites = sites = survey.sites
        self.modules = tuple(OffloadedExperts(site) for site in sites)
        self._left_resident = len(survey.left_resident)
        self.session: Any = None
        self.holding = "checkpoint"
        self._implementations = _implementations(model, survey)
        self._generation: list[tuple[Any, Any]] = []
        self._finalizer: weakref.finalize[Any, Any] | None = None

    @property
    def num_parameters(self) -> int:
        """Parameters that the model does not show while it is offloaded."""
        return sum(site.num_parameters for site in self.sites)

    def swap_in(self, model: nn.Module) -> None:
        """Puts the offloaded modules in place and names the implementation in their configs."""
        compat.register_experts_function(IMPLEMENTATION)
        for site, module in zip(self.sites, self.modules, strict=True):
            model.set_submodule(site.name, module)
        for config, _ in self._implementations:
            compat.set_experts_implementation(config, IMPLEMENTATION)

    def bind(self, model: nn.Module, session: Any, *, holding: str) -> None:
        """Connects the modules to a session and makes the model own it as `model.sluice`.

        Args:
            model: The model that `swap_in` changed.
            session: Of `binding.open_session`.
            holding: Where the experts are: "ram" (the original parameters), "disk" (a spilled
                pack) or "checkpoint".
        """
        for layer, (site, module) in enumerate(zip(self.sites, self.modules, strict=True)):
            names = site.parameters.values() if holding == "ram" else ()
            module.bind(session, layer, {name: getattr(site.module, name) for name in names})
        self.session = session
        self.holding = holding
        session.tap = Tap(model, session, self.sites)
        if holding == "ram":
            session.note("adopted_in_ram", len(self.sites))
        if self._left_resident:
            session.note("experts_left_resident", self._left_resident)
        generation = getattr(model, "generation_config", None)
        if generation is not None:
            self._generation = [(generation, getattr(generation, "disable_compile", None))]
            generation.disable_compile = True  # a captured graph would replay stale slots
        preset = session.options.preset
        for predictor in session.options.predictors:
            session.predict(predictor, kind=None if preset is None else PRESETS[preset][1])
        _wrap_methods(model, self)
        object.__setattr__(model, "sluice", session)
        object.__setattr__(model, _ATTRIBUTE, self)
        self._finalizer = weakref.finalize(model, session.close)
        self._finalizer.atexit = False  # the session has a way of its own to end with the process

    def swap_out(self, model: nn.Module) -> None:
        """Gives the original modules, config fields and methods back; bytes are the caller's."""
        for site in self.sites:
            model.set_submodule(site.name, site.module)
        for config, before in self._implementations:
            compat.set_experts_implementation(config, before)
        for generation, before in self._generation:
            generation.disable_compile = before
        for name in (*_WRAPPED, "sluice", _ATTRIBUTE):
            model.__dict__.pop(name, None)
        if self._finalizer is not None:
            self._finalizer.detach()
        if self.session is not None:
            self.session.tap.close()

    @contextmanager
    def unlocked_generation_config(self) -> Any:
        """The generation config as the user left it, while files are written."""
        for generation, before in self._generation:
            generation.disable_compile = before
        try:
            yield
        finally:
            for generation, _ in self._generation:
                generation.disable_compile = True


def _implementations(model: nn.Module, survey: Survey) -> list[tuple[Any, Any]]:
    """(config, implementation) of every config that a site or the decode loop looks at."""
    configs = {id(config): config for config in owners_of_experts(survey.sites)}
    if hasattr(model, "config"):
        configs |= {id(c): c for c in compat.sub_configs(model.config)}
    chosen = [(config, compat.experts_implementation(config)) for config in configs.values()]
    return [(config, name) for config, name in chosen if name is not None]


def attachment_of(model: nn.Module) -> Attachment | None:
    """What sluice has done to a model; None when nothing."""
    return model.__dict__.get(_ATTRIBUTE)


def _wrap_methods(model: nn.Module, attachment: Attachment) -> None:
    """Methods on the instance that would lie or do half of their work otherwise.

    They reach the model weakly: an instance that owns a closure over itself outlives its last user.
    """
    reference = weakref.ref(model)
    kind: Any = type(model)

    def get_memory_footprint(*args: Any, **kwargs: Any) -> int:
        stats = attachment.session.stats()
        dense = kind.get_memory_footprint(reference(), *args, **kwargs)
        return dense + stats.resident_bytes + stats.adopted_bytes

    def num_parameters(only_trainable: bool = False, exclude_embeddings: bool = False) -> int:
        dense = kind.num_parameters(reference(), only_trainable, exclude_embeddings)
        return dense if only_trainable else dense + attachment.num_parameters

    def save_pretrained(*args: Any, **kwargs: Any) -> Any:
        held: Any = reference()
        if kwargs.get("state_dict") is None:
            held.state_dict()  # raises before the first file when experts are not in RAM
        with attachment.unlocked_generation_config():
            return kind.save_pretrained(held, *args, **kwargs)

    def generate(*args: Any, **kwargs: Any) -> Any:
        held: Any = reference()

        def setting(name: str) -> Any:
            return _setting(held, *args, name=name, **kwargs)

        _refuse_mtp(held, setting("use_mtp"))
        tap = attachment.session.tap
        if not tap.active:
            return kind.generate(held, *args, **kwargs)
        ends = {*_ids(setting("eos_token_id")), *_ids(setting("pad_token_id"))}
        with tap.generating(ends, moves_rows=(setting("num_beams") or 1) > 1):
            return kind.generate(held, *args, **kwargs)

    def _apply(fn: Any, recurse: bool = True) -> Any:
        # Before the first tensor is changed: a device that has no room keeps all where it is.
        places = {module.check_move(fn) for module in attachment.modules}
        for place in places:
            if place is not None:
                attachment.session.move_to(place)
                attachment.home = place
        return kind._apply(reference(), fn, recurse)

    methods: tuple[tuple[str, Any], ...] = (
        ("get_memory_footprint", get_memory_footprint),
        ("num_parameters", num_parameters),
        ("save_pretrained", save_pretrained),
        ("generate", generate),
        ("_apply", _apply),
    )
    for name, method in methods:
        if hasattr(kind, name):
            object.__setattr__(
                model, name, functools.update_wrapper(cast(Any, method), getattr(kind, name))
            )


def _setting(
    model: Any,
    inputs: Any = None,
    generation_config: Any = None,
    *_: Any,
    name: str,
    **kwargs: Any,
) -> Any:
    """What a call of `generate` asks for under `name`, as transformers merges it; None: nothing."""
    configs = (generation_config, getattr(model, "generation_config", None))
    asked = [kwargs.get(name), *(getattr(config, name, None) for config in configs)]
    return next((value for value in asked if value is not None), None)


def _ids(value: Any) -> list[int]:
    """Token ids as a list; generation configs write one, several, or none."""
    if value is None:
        return []
    return [int(i) for i in (value if isinstance(value, list | tuple) else [value])]


def _refuse_mtp(model: Any, asked: Any) -> None:
    """Multi-token prediction loads a layer of its own inside of `generate`, resident and whole."""
    if asked:
        raise UnsupportedModelError(
            f"{type(model).__name__}.generate: got use_mtp=True, which loads one more layer with "
            "all its experts past device_memory; generate without it"
        )
