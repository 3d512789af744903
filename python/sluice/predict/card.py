"""Predictors on disk: a folder with `predictor.safetensors` and `card.json`, nothing executable.

The card says what the numbers are of and what they were fitted on, so that a predictor is neither
used with another model nor scored on what it has read.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from sluice.errors import CheckpointError, ConfigError
from sluice.predict.base import BasePredictor, Fitting, Shape
from sluice.predict.registry import names, predictor_class, settings_of

VERSION = 1
CARD, ARRAYS = "card.json", "predictor.safetensors"
MAX_CARD_BYTES = 64 << 20
MAX_LAYERS, MAX_EXPERTS = 1 << 12, 1 << 15
"""A card that claims more is a lie: no buffer is sized by it."""


def is_saved(folder: Path) -> bool:
    """Whether a predictor was saved here."""
    return (folder / CARD).is_file()


def save(
    predictor: BasePredictor[Any],
    folder: str | os.PathLike[str],
    *,
    evaluation: Mapping[str, Any] | None = None,
) -> Path:
    """Writes a fitted predictor; a folder that holds one already gets the new one.

    Args:
        predictor: One of sluice's own, fitted (or bound).
        folder: Made if it is not there, for this user alone.
        evaluation: Figures for people, JSON values.

    Returns:
        The folder.

    Raises:
        ConfigError: The predictor has no shape yet, or is none that `load` could make again.
        IoError: The folder cannot be written (as OSError).
    """
    from safetensors.numpy import save as to_bytes

    if predictor.shape is None:
        raise ConfigError(f"{predictor.name}: got a predictor that is not fitted; call fit first")
    if type(predictor) is not predictor_class(predictor.name):
        raise ConfigError(
            f"{predictor.name}: got an object of {type(predictor).__name__}, expected one that "
            f"sluice can make again: {', '.join(names())}"
        )
    place = Path(folder)
    place.mkdir(parents=True, exist_ok=True, mode=0o700)
    arrays = {name: np.ascontiguousarray(array) for name, array in predictor.state().items()}
    card = {
        "sluice_predictor": VERSION,
        "kind": predictor.name,
        "settings": dataclasses.asdict(predictor.settings),
        "shape": dataclasses.asdict(predictor.shape),
        "fitting": dataclasses.asdict(predictor.fitting),
        "evaluation": dict(evaluation or {}),
    }
    _write(place / ARRAYS, to_bytes(arrays))
    _write(place / CARD, json.dumps(card, indent=1).encode())  # last: with it the folder counts
    return place


def load(
    folder: str | os.PathLike[str], model_fingerprint: str | None = None
) -> BasePredictor[Any]:
    """The predictor of a folder.

    Args:
        folder: What `save` wrote.
        model_fingerprint: Of the model it will predict for; None does not ask.

    Raises:
        CheckpointError: Damaged, of a kind or version that is not known, or of another model.
    """
    place = Path(folder)
    card = read_card(place)
    fitting = _fitting(place, card["fitting"])
    if model_fingerprint is not None and fitting.model != model_fingerprint:
        raise CheckpointError(
            f"{place}: got a predictor of {fitting.model or 'an unknown model'!r}, expected one of "
            f"{model_fingerprint!r}; train one on traces of this model"
        )
    try:
        kind = predictor_class(card["kind"])
        settings = settings_of(kind, card["settings"])
    except (ConfigError, TypeError) as error:
        raise CheckpointError(f"{place / CARD}: {error}") from error
    predictor: BasePredictor[Any] = kind(settings)
    predictor.bind(_shape(place, card["shape"]))
    predictor.load_state(_arrays(place / ARRAYS))
    predictor.fitting = fitting
    return predictor


def read_card(folder: Path) -> dict[str, Any]:
    """The card of a folder, its fields there and of the right types.

    Raises:
        CheckpointError: No card, no JSON, another version, or fields missing or of other types.
    """
    path = folder / CARD
    if not path.is_file():
        raise CheckpointError(
            f"{folder}: got no {CARD}, expected a predictor that `sluice train` wrote"
        )
    if path.stat().st_size > MAX_CARD_BYTES:
        raise CheckpointError(f"{path}: got {path.stat().st_size} bytes, expected a card")
    try:
        card: Any = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: got no JSON ({error}), expected a card") from error
    if not isinstance(card, dict):
        raise CheckpointError(f"{path}: got {type(card).__name__}, expected a JSON object")
    card = cast("dict[str, Any]", card)
    if card.get("sluice_predictor") != VERSION:
        raise CheckpointError(
            f"{path}: got version {card.get('sluice_predictor')!r}, expected {VERSION}; train it "
            "again with this sluice"
        )
    wanted = {"kind": str, "settings": dict, "shape": dict, "fitting": dict, "evaluation": dict}
    for name, kind in wanted.items():
        if not isinstance(card.get(name), kind):
            raise CheckpointError(
                f"{path}: got {name} {card.get(name)!r:.80}, expected a {kind.__name__}"
            )
    return card


def _shape(place: Path, fields: Mapping[str, Any]) -> Shape:
    limits = {"num_layers": MAX_LAYERS, "num_experts": MAX_EXPERTS, "top_k": MAX_EXPERTS}
    for name, most in limits.items():
        value = fields.get(name)
        if type(value) is not int or not 1 <= value <= most:
            raise CheckpointError(f"{place / CARD}: got {name} {value!r:.80}, expected 1 to {most}")
    if fields["top_k"] > fields["num_experts"]:
        raise CheckpointError(
            f"{place / CARD}: got top_k {fields['top_k']} of {fields['num_experts']} experts"
        )
    return Shape(**{name: fields[name] for name in limits})


def _fitting(place: Path, fields: Mapping[str, Any]) -> Fitting:
    kinds: dict[str, Any] = {
        "model": str,
        "source": str,
        "fit": list,
        "choose": list,
        "tokens": int,
        "seed": int,
        "duration_s": (int, float),
        "notes": dict,
    }
    for name, kind in kinds.items():
        if not isinstance(fields.get(name), kind):
            raise CheckpointError(
                f"{place / CARD}: got fitting.{name} {fields.get(name)!r:.80}, expected {kind}"
            )
    for name in ("fit", "choose"):
        if not all(isinstance(each, str) for each in fields[name]):
            raise CheckpointError(f"{place / CARD}: got fitting.{name} that are no hashes")
    values: dict[str, Any] = {name: fields[name] for name in kinds}
    values["fit"], values["choose"] = tuple(fields["fit"]), tuple(fields["choose"])
    return Fitting(**values)


def _arrays(path: Path) -> dict[str, NDArray[Any]]:
    from safetensors.numpy import load_file

    if not path.is_file():
        raise CheckpointError(f"{path}: got no file, expected the predictor's arrays")
    try:
        return load_file(path)
    except Exception as error:  # safetensors raises its own class and, for odd types, KeyError
        raise CheckpointError(f"{path}: got no safetensors ({error}); train it again") from error


def _write(path: Path, content: bytes) -> None:
    """Whole or not at all, and readable by this user alone."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
        os.replace(name, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(name)
        raise
