"""Predictors by name: `make` takes names, folders of saved ones, classes and objects."""

from __future__ import annotations

import dataclasses
import importlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from sluice.errors import ConfigError
from sluice.predict.protocol import Predictor
from sluice.text import nearest

_ROOM = "sluice.predict"
_PLACES = {
    "popularity": "training_free.popularity:Popularity",
    "previous-token": "training_free.previous_token:PreviousToken",
    "decayed-frequency": "training_free.decayed_frequency:DecayedFrequency",
    "token-table": "training_free.token_table:TokenTable",
    "path-table": "training_free.path_table:PathTable",
    "path-neighbours": "training_free.path_neighbours:PathNeighbours",
    "expert-map": "training_free.expert_map:ExpertMap",
    "prompt-ema": "training_free.prompt_ema:PromptEma",
    "next-gate": "training_free.next_gate:NextGate",
    "forecaster": "networks.forecaster:Forecaster",
    "layer-mlp": "networks.layer_mlp:LayerMlp",
    "state-mlp": "networks.state_mlp:StateMlp",
    "prompt-encoder": "networks.prompt_encoder:PromptEncoder",
    "routing-path": "networks.routing_path:RoutingPath",
    "routing-path-t5": "networks.routing_path_t5:RoutingPathT5",
}


def names() -> tuple[str, ...]:
    """What `make` knows by name."""
    return tuple(_PLACES)


def predictor_class(name: str) -> type[Any]:
    """The class behind a name.

    Raises:
        ConfigError: There is no such predictor; the nearest name is given.
    """
    place = _PLACES.get(name)
    if place is None:
        raise ConfigError(
            f"predictor: got {name!r}, expected one of {', '.join(_PLACES)}, or a folder that "
            f"`sluice train` wrote{nearest(name, _PLACES)}"
        )
    module, _, kind = place.partition(":")
    return cast("type[Any]", getattr(importlib.import_module(f"{_ROOM}.{module}"), kind))


def make(
    what: str | os.PathLike[str] | Predictor | type[Any],
    settings: Mapping[str, Any] | None = None,
    *,
    model_fingerprint: str | None = None,
) -> Predictor:
    """A predictor from whatever names one.

    Args:
        what: A name, a folder that `save` wrote, a class without arguments, or a predictor.
        settings: Fields of the predictor's settings; with a name only.
        model_fingerprint: Of the model it will predict for; a saved predictor of another one is
            refused.

    Raises:
        ConfigError: Nothing of that name, settings that it does not have, or what is given speaks
            no protocol.
        CheckpointError: The folder is damaged, or of another model.
    """
    if isinstance(what, str) and what in _PLACES:
        kind = predictor_class(what)
        return kind(settings_of(kind, settings or {}))
    if settings:
        raise ConfigError(
            f"predictor: got settings {sorted(settings)} beside {what!r}, expected them beside one "
            f"of the names {', '.join(_PLACES)} alone"
        )
    if isinstance(what, str | os.PathLike):
        from sluice.predict.card import is_saved, load

        if is_saved(Path(what)):
            return load(Path(what), model_fingerprint)
        return predictor_class(os.fspath(what))()  # raises: no name, no folder
    made: Any = what() if isinstance(what, type) else what
    if not isinstance(made, Predictor):
        raise ConfigError(
            f"predictor: got {type(made).__name__}, expected a name, a folder, or an object with "
            "name, begin_step, observe, plan and forecast"
        )
    return made


def settings_of(kind: type[Any], fields: Mapping[str, Any]) -> Any:
    """A predictor's settings from JSON values.

    Raises:
        ConfigError: A field that it does not have, with the nearest one, or a value out of range.
    """
    known = {field.name: field for field in dataclasses.fields(kind.settings_type)}
    values: dict[str, Any] = {}
    for name, value in fields.items():
        if name not in known:
            raise ConfigError(
                f"{kind.name}: there is no setting {name!r}, expected {', '.join(known) or 'none'}"
                f"{nearest(name, known)}"
            )
        listed = isinstance(value, list) and isinstance(known[name].default, tuple)
        values[name] = tuple(cast("list[Any]", value)) if listed else value
    return kind.settings_type(**values)
