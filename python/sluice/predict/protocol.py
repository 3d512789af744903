"""What a predictor is, whatever its granularity: it observes routing and plans what comes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class RoutingEvent:
    """One MoE layer of one step, as the router decided it.

    Args:
        step: Counts forwards.
        layer: Position among the MoE layers.
        experts: int16 `[T, K]`, heaviest first; -1 for none.
        weights: float32 `[T, K]`, or None.
        requests: int64 `[T]`: which request a row belongs to.
        decode: Whether the rows are one token each of running requests; False in a prompt.
        token_ids: int32 `[T]` that entered the step, or None where nobody keeps them.
        hidden: float32 `[T, H]` that entered the layer's experts, or None.
        tasks: Per row, "" for none.
    """

    step: int
    layer: int
    experts: Array
    weights: Array | None = None
    requests: Array
    decode: bool = True
    token_ids: Array | None = None
    hidden: Array | None = None
    tasks: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, order=True)
class Guess:
    """A hint before it has a clock: expert `expert` of `layer`, `steps_ahead` forwards from now.

    `probability` in (0, 1]. Steps ahead 0: later in the running step.
    """

    layer: int
    expert: int
    probability: float
    steps_ahead: int = 0


@runtime_checkable
class Predictor(Protocol):
    """Turns observed routes, states or tokens into guesses, and maybe into keep-scores.

    `begin_step` comes before layer 0 of each forward, `observe` after each layer's router. A
    predictor never raises for what it has not seen: it guesses nothing.

    What it may have beside these, each asked for by name and left out at will:

    - `needs_hidden`: True, and events carry states;
    - `prompt_tokens`: how many of a prompt's newest tokens it wants to see; None, all;
    - `needs_fit` and `shape`: it knows nothing while the one is True and the other None, and is
      refused beside a model; one with a `bind(shape)` that needs no fit is told the shape;
    - `upcoming(horizon)`: float32 `[horizon, E]`, in place of `plan`, which is then not asked;
    - `capacity`: set before it runs to the experts of a layer that the cache can hold;
    - `core_tables()`: a kind of scorer and its tables (`csrc/predict/scorers.h`), by which the core
      does its work without Python; None: it runs on a thread.
    """

    name: str

    def begin_step(
        self, step: int, requests: Array, token_ids: Array | None, tasks: Sequence[str]
    ) -> None:
        """A forward begins with these rows; ids where they are known."""
        ...

    def observe(self, event: RoutingEvent) -> None:
        """What one layer's router chose."""
        ...

    def plan(self, horizon: int) -> list[Guess]:
        """Best first, for the next `horizon` layer visits, which may be of the next step."""
        ...

    def forecast(self) -> Array | None:
        """Keep-scores float32 `[S, E]` of every expert, larger stays; None: it ranks nobody."""
        ...


def union_probability(probabilities: Array) -> Array:
    """That at least one of a batch's rows comes true (noisy-or), `[T, ...]` → `[...]`."""
    return 1.0 - np.prod(1.0 - np.clip(probabilities, 0.0, 1.0), axis=0)
