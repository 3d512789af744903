"""A table from the token that enters to its experts, for all layers before the first one runs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sluice.errors import CheckpointError, ConfigError
from sluice.predict.arrays import multi_hot, rows_of, take
from sluice.predict.base import BasePredictor, Progress
from sluice.predict.live import Request
from sluice.predict.offline import Horizon, known_layers
from sluice.predict.training_free.counting import check_rates, expert_rates
from sluice.predict.training_free.decayed import (
    LIFT_HALF_LIFE,
    DecayedCounts,
    check_positive,
    lift_trace,
)
from sluice.trace import Trace

Array = NDArray[Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenTableSettings:
    """How to count, and whether to follow the running sequence.

    Args:
        back_off: Weight of the rates of all tokens in a token's own, in occurrences.
        max_tokens: Token ids that are kept, the most frequent ones.
        adapt: Raise what the running sequence uses more than others do, and lower what it does not.
    """

    back_off: float = 4.0
    max_tokens: int = 16384
    adapt: bool = False

    def __post_init__(self) -> None:
        check_positive(
            back_off=self.back_off,
            max_tokens=self.max_tokens,
        )


class TokenTable(BasePredictor[TokenTableSettings]):
    """`P(e | token id)` per layer, backed off to all tokens' rates; exact for token-only routers.

    An id that was not fitted, or is unknown, gets the rates of all tokens.
    """

    name = "token-table"
    settings_type = TokenTableSettings

    _rates: Array | None = None  # [S, E]
    _ids: Array = np.zeros(0, np.int64)  # [U], ascending
    _table: Array = np.zeros((0, 0, 0), np.float32)  # [U, S, E]

    def scores(self, trace: Trace, horizon: Horizon) -> Array:
        """As the base says; the horizon changes nothing."""
        self.check(trace)
        known_layers(horizon, trace.num_layers)
        ids = np.full(trace.num_tokens, -1) if trace.token_ids is None else trace.token_ids
        found = self._look_up(ids)
        if self.settings.adapt and self._rates is not None:
            lift_trace(found, self._rates, trace)
        return found

    def state(self) -> dict[str, Array]:
        """`rates` float32 `[S, E]`, `ids` int64 `[U]`, `table` float32 `[U, S, E]`."""
        assert self._rates is not None
        return {"rates": self._rates, "ids": self._ids, "table": self._table}

    def load_state(self, arrays: Mapping[str, Array]) -> None:
        """Takes what `state` gave."""
        assert self.shape is not None
        layers, experts = self.shape.num_layers, self.shape.num_experts
        ids = take(arrays, "ids", (-1,), np.int64)
        if (np.diff(ids) <= 0).any():
            raise CheckpointError("token-table: got ids out of order, expected them ascending")
        self._rates = check_rates("rates", take(arrays, "rates", (layers, experts)))
        self._table = check_rates("table", take(arrays, "table", (len(ids), layers, experts)))
        self._ids = ids

    def _fit(
        self, trace: Trace, choose: Trace | None, seed: int, progress: Progress
    ) -> Mapping[str, Any] | None:
        if trace.token_ids is None:
            raise ConfigError(
                "token-table: got a trace without token ids, expected them; record it with token "
                "ids, or train a predictor that reads routes alone"
            )
        self._rates = expert_rates(trace)
        ids, owner, seen = np.unique(trace.token_ids, return_inverse=True, return_counts=True)
        kept = np.sort(np.argsort(-seen, kind="stable")[: self.settings.max_tokens])
        place = np.full(len(ids), -1)
        place[kept] = np.arange(len(kept))
        back = np.float32(self.settings.back_off)
        table = np.broadcast_to(back * self._rates, (len(kept), *self._rates.shape)).copy()
        for row, index in enumerate(place[owner].tolist()):
            if index >= 0:
                table[index] += multi_hot(trace.experts[row], trace.num_experts)
        table /= (seen[kept].astype(np.float32) + back)[:, None, None]
        self._ids, self._table = ids[kept].astype(np.int64), table
        progress(1, 1)
        return {"distinct_tokens": len(ids), "kept_tokens": len(kept)}

    def _begin(self, request: Request) -> None:
        if self.settings.adapt:
            assert self.shape is not None
            layers, experts = self.shape.num_layers, self.shape.num_experts
            request.memory = DecayedCounts(layers, experts, LIFT_HALF_LIFE)

    def _predict(self, request: Request, first: int, stop: int) -> Array:
        found = self._look_up(np.array([request.token_id]))[0, first:stop]
        if self.settings.adapt and self._rates is not None:
            return request.memory.lift(found, self._rates[first:stop], slice(first, stop))
        return found

    def _finish(self, request: Request) -> None:
        if self.settings.adapt:
            request.memory.add(request.routes)

    def _look_up(self, ids: Array) -> Array:
        """Rates for token ids `[T]`, -1 unknown: float32 `[T, S, E]`, the caller's own."""
        assert self.shape is not None
        shape = (len(ids), self.shape.num_layers, self.shape.num_experts)
        if self._rates is None:
            return np.zeros(shape, np.float32)
        found = np.broadcast_to(self._rates, shape).copy()
        place = rows_of(ids, self._ids)
        known = place < len(self._ids)
        found[known] = self._table[place[known]]
        return found
