"""KV caches as keepers of requests: who is in their rows, and whether they were reworked since."""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from sluice.hf.steps import Requests

_NAMES = ("cache", "past_key_values", "cache_params")  # the newest first: reading the others warns


@dataclass(slots=True)
class Known:
    """What a cache holds: its requests, how many tokens of each, and as which tensor."""

    requests: Requests
    tasks: tuple[str, ...]
    length: int = 0
    tells_length: bool = True
    decoding: bool = False
    keys: weakref.ref[torch.Tensor] | None = None

    def untouched(self, cache: Any) -> bool:
        """Whether it holds what the last forward left in it."""
        if self.tells_length and length_of(cache) != self.length:
            return False
        return (None if self.keys is None else self.keys()) is keys_of(cache)


def length_of(cache: Any) -> int:
    """Tokens that a cache says it holds; 0 where it does not say."""
    try:
        return int(cache.get_seq_length())
    except (AttributeError, TypeError, ValueError, IndexError, NotImplementedError):
        return 0


def keys_of(cache: Any) -> torch.Tensor | None:
    """The tensor of its first layer of attention: another one when somebody reworked the cache."""
    for layer in getattr(cache, "layers", None) or ():
        keys = getattr(layer, "keys", None)
        if isinstance(keys, torch.Tensor):
            return keys
    return None


def cache_in(fields: Mapping[str, Any]) -> Any:
    """The cache among what a forward takes or returns, under any name that it goes by."""
    return next((fields[name] for name in _NAMES if fields.get(name) is not None), None)


def cache_of(output: Any) -> Any:
    """The cache that a forward made and returned."""
    if isinstance(output, Mapping):
        return cache_in(output)
    parts: tuple[Any, ...] = output if isinstance(output, tuple) else ()
    return next((part for part in parts if hasattr(part, "get_seq_length")), None)


def is_trackable(cache: Any) -> bool:
    """Whether it can be remembered without keeping it alive."""
    return type(cache).__hash__ is object.__hash__ and hasattr(type(cache), "__weakref__")


def is_empty(cache: Any, known: Known) -> bool:
    """Whether it was reset since it held something."""
    return known.tells_length and length_of(cache) == 0
