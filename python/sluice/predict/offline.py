"""Predictors over whole traces: what may be read when, and the live protocol driven over a trace.

`drive` makes any predictor that speaks the protocol usable in evaluation and simulation; sluice's
own predictors compute the same numbers for all tokens at once.
"""

from __future__ import annotations

from typing import Any, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from sluice.errors import ConfigError
from sluice.predict.protocol import Predictor, RoutingEvent
from sluice.trace import Trace, TraceSequence

Array = NDArray[Any]

Horizon: TypeAlias = int | Literal["token"]
"""How far ahead a score looks: "token", before layer 0 of the token runs; h ≥ 1, h layers."""


def known_layers(horizon: Horizon, num_layers: int) -> Array:
    """How many layers of the running token a score for layer s may read: int `[S]`.

    Raises:
        ConfigError: The horizon is neither "token" nor an int of at least 1.
    """
    if horizon == "token":
        return np.zeros(num_layers, np.int64)
    if type(horizon) is not int or horizon < 1:
        raise ConfigError(
            f"horizon: got {horizon!r}, expected 'token' or a number of layers of at least 1; what "
            "a router has answered needs no prediction"
        )
    return np.maximum(np.arange(num_layers) - horizon + 1, 0)


def previous_routes(trace: Trace) -> Array:
    """Routes of the token before, in the same sequence: int16 `[N, S, K]`, -1 at its start."""
    previous = np.full_like(trace.experts, -1)
    previous[1:] = trace.experts[:-1]
    for sequence in trace.sequences:
        previous[sequence.start] = -1
    return previous


def drive(predictor: Predictor, trace: Trace, horizon: Horizon) -> Array:
    """`scores` of any predictor, one token and layer at a time through the live protocol.

    The predictor's live state is whatever it was; sequences run one after another, each token a
    step of its own.

    Returns:
        float32 `[N, S, E]`: the probabilities that `plan` named, 0 for what it did not.
    """
    layers = trace.num_layers
    known = known_layers(horizon, layers)
    found = np.zeros((trace.num_tokens, layers, trace.num_experts), np.float32)
    _forget(predictor)
    for row, sequence, number in _tokens(trace):
        _begin(predictor, trace, row, sequence, number)
        for layer in range(layers + 1):
            targets = np.flatnonzero(known == layer)
            if targets.size:
                ahead = _ahead(predictor, layer, int(targets[-1]) + 1 - layer, trace.num_experts)
                found[row, targets] = ahead[targets - layer]
            if layer < layers:
                predictor.observe(_event(trace, row, layer, sequence, number))
    _forget(predictor)
    return found


def drive_keep_scores(predictor: Predictor, trace: Trace) -> Array | None:
    """`keep_scores` of any predictor: row s of `forecast` after layer s of each token."""
    shape = (trace.num_tokens, trace.num_layers, trace.num_experts)
    kept = np.zeros(shape, np.float32)
    _forget(predictor)
    for row, sequence, number in _tokens(trace):
        _begin(predictor, trace, row, sequence, number)
        for layer in range(trace.num_layers):
            predictor.observe(_event(trace, row, layer, sequence, number))
            forecast = predictor.forecast()
            if forecast is None:
                return None
            kept[row, layer] = forecast[layer]
    _forget(predictor)
    return kept


def _tokens(trace: Trace) -> Any:
    for number, sequence in enumerate(trace.sequences):
        for row in range(sequence.start, sequence.start + sequence.length):
            yield row, sequence, number


def _forget(predictor: Any) -> None:
    """A user's predictor need not be able to."""
    if hasattr(predictor, "reset"):
        predictor.reset()


def _begin(
    predictor: Predictor, trace: Trace, row: int, sequence: TraceSequence, number: int
) -> None:
    ids = None if trace.token_ids is None else trace.token_ids[row : row + 1]
    predictor.begin_step(row, np.array([number], np.int64), ids, (sequence.task,))


def _event(
    trace: Trace, row: int, layer: int, sequence: TraceSequence, number: int
) -> RoutingEvent:
    one = slice(row, row + 1)
    return RoutingEvent(
        step=row,
        layer=layer,
        experts=trace.experts[one, layer],
        weights=None if trace.weights is None else trace.weights[one, layer],
        requests=np.array([number], np.int64),
        token_ids=None if trace.token_ids is None else trace.token_ids[one],
        hidden=None if trace.hidden is None else trace.hidden[one, layer].astype(np.float32),
        tasks=(sequence.task,),
    )


def _ahead(predictor: Any, layer: int, horizon: int, num_experts: int) -> Array:
    """The next visits, all of the running step, dense where the predictor gives them so."""
    if hasattr(predictor, "upcoming"):
        return predictor.upcoming(horizon)
    dense = np.zeros((horizon, num_experts), np.float32)
    for guess in predictor.plan(horizon):
        visit = guess.layer - layer
        if guess.steps_ahead == 0 and 0 <= visit < horizon and 0 <= guess.expert < num_experts:
            dense[visit, guess.expert] = max(dense[visit, guess.expert], guess.probability)
    return dense
