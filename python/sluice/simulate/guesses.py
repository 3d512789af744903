"""What predictions become in a simulation: guesses and keep-scores, event by event."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sluice.errors import ConfigError
from sluice.simulate.routes import Routes

Array = NDArray[Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Guesses:
    """For each of M events, what is guessed once its own demands are on their way.

    Args:
        begins: int64 `[M + 1]`.
        layers: int32 `[G]`.
        experts: int32 `[G]`.
        probabilities: float32 `[G]`, in (0, 1].
        steps_ahead: int32 `[G]`; 0: later in the event's own step.
    """

    begins: Array
    layers: Array
    experts: Array
    probabilities: Array
    steps_ahead: Array


def oracle_guesses(routes: Routes, horizon: int) -> Guesses:
    """The truth, `horizon` events ahead: each event is told once who the event there needs.

    `routes.num_layers` is one token ahead. No predictor can do better at that horizon.

    Raises:
        ConfigError: A horizon below 1.
    """
    if horizon < 1:
        raise ConfigError(f"horizon: got {horizon}, expected at least 1 event")
    counts = np.zeros(routes.num_events, dtype=np.int64)
    ahead = np.diff(routes.begins)[horizon:]
    counts[: ahead.size] = ahead
    begin = int(routes.begins[min(horizon, routes.num_events)])
    source = np.repeat(np.arange(routes.num_events), counts)
    target = np.minimum(source + horizon, routes.num_events - 1)
    return Guesses(
        begins=np.concatenate([[0], np.cumsum(counts)]).astype(np.int64),
        layers=routes.layers[target].astype(np.int32),
        experts=routes.experts[begin:].astype(np.int32),
        probabilities=np.ones(source.size, dtype=np.float32),
        steps_ahead=(routes.steps[target] - routes.steps[source]).astype(np.int32),
    )


def next_use_scores(routes: Routes) -> Array:
    """Keep-scores that know the future, float32 `[M, E]`: minus the turn of each expert's next use.

    With "forecast:always" they make a cache choose Belady's victims, also across layers.
    """
    far = -np.float32(2 * routes.num_events + 2)
    scores = np.empty((routes.num_events, routes.num_experts), dtype=np.float32)
    upcoming = np.full((routes.num_layers, routes.num_experts), far, dtype=np.float32)
    for event in range(routes.num_events - 1, -1, -1):
        layer = routes.layers[event]
        scores[event] = upcoming[layer]
        used = routes.experts[routes.begins[event] : routes.begins[event + 1]]
        upcoming[layer, used] = -event
    return scores


def guesses_of(
    routes: Routes, scores: Array, *, horizon: int | str, most: int, least_probability: float = 0.0
) -> Guesses:
    """A predictor's probabilities as guesses.

    Args:
        routes: Of a batch of 1.
        scores: float32 `[N, S, E]`: the probability that token n uses expert e of layer s, as the
            predictor knows it at `horizon` (`Predictor.scores`).
        horizon: h: at layer l's visit, guesses for layer l + h of the same token. "token": at the
            first layer's visit, guesses for all later ones.
        most: Guesses for a layer.
        least_probability: Below it nothing is guessed.

    Raises:
        ConfigError: Routes of a batch, or a horizon that is none.
    """
    if routes.rows is None:
        raise ConfigError("guesses: got routes of a batch, expected a batch of 1")
    layers = routes.num_layers
    if horizon == "token":
        source_layer = np.zeros(layers, dtype=np.int64)
        targets = np.arange(1, layers)
    elif isinstance(horizon, int) and horizon >= 1:
        source_layer = np.arange(layers) - horizon
        targets = np.arange(horizon, layers)
    else:
        raise ConfigError(f'horizon: got {horizon!r}, expected "token" or at least 1 layer')
    rows = routes.rows[:: routes.num_layers]
    best = np.argsort(-scores[rows][:, targets], axis=2, kind="stable")[:, :, :most]
    values = np.take_along_axis(scores[rows][:, targets], best, axis=2)
    tokens = np.arange(rows.size)[:, None, None]
    event = np.broadcast_to(
        tokens * layers + source_layer[targets][None, :, None], values.shape
    ).reshape(-1)
    layer = np.broadcast_to(targets[None, :, None], values.shape).reshape(-1)
    keep = (values > max(least_probability, 0.0)).reshape(-1)
    order = np.argsort(event[keep], kind="stable")
    counts = np.bincount(event[keep], minlength=routes.num_events)
    return Guesses(
        begins=np.concatenate([[0], np.cumsum(counts)]).astype(np.int64),
        layers=layer[keep][order].astype(np.int32),
        experts=best.reshape(-1)[keep][order].astype(np.int32),
        probabilities=np.minimum(values.reshape(-1)[keep][order], 1.0).astype(np.float32),
        steps_ahead=np.zeros(int(keep.sum()), dtype=np.int32),
    )
