"""The experts that the token before used: reuse, the least that a predictor has to beat."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sluice.predict.arrays import multi_hot, take
from sluice.predict.base import BasePredictor, Progress
from sluice.predict.live import Request
from sluice.predict.offline import Horizon, known_layers, previous_routes
from sluice.predict.training_free.counting import check_rates, expert_counts
from sluice.trace import Trace

Array = NDArray[Any]

_UNFITTED_STAY = 0.5
_BELOW = np.float32(0.999)


@dataclass(frozen=True, slots=True, kw_only=True)
class PreviousTokenSettings:
    """Nothing to set."""


class PreviousToken(BasePredictor[PreviousTokenSettings]):
    """The last token's experts first, whatever else is likely; then those that are popular.

    What a fit adds are probabilities: how often an expert stays, per layer, and the rate of those
    that come anew, kept below the former so that reuse ranks first. Works without a fit.
    """

    name = "previous-token"
    settings_type = PreviousTokenSettings
    needs_fit = False

    _stay: Array | None = None  # [S, 1]
    _new: Array | None = None  # [S, E]

    def scores(self, trace: Trace, horizon: Horizon) -> Array:
        """As the base says; the horizon changes nothing."""
        self.check(trace)
        known_layers(horizon, trace.num_layers)
        before = multi_hot(previous_routes(trace), trace.num_experts)
        return self._of(before, trace.num_layers, trace.num_experts)

    def state(self) -> dict[str, Array]:
        """`stay` float32 `[S, 1]` and `new` float32 `[S, E]`."""
        if self._stay is None or self._new is None:
            return {}
        return {"stay": self._stay, "new": self._new}

    def load_state(self, arrays: Mapping[str, Array]) -> None:
        """Takes what `state` gave."""
        assert self.shape is not None
        if arrays:
            layers, experts = self.shape.num_layers, self.shape.num_experts
            self._stay = check_rates("stay", take(arrays, "stay", (layers, 1)))
            self._new = check_rates("new", take(arrays, "new", (layers, experts)))

    def _fit(
        self, trace: Trace, choose: Trace | None, seed: int, progress: Progress
    ) -> Mapping[str, Any] | None:
        previous = previous_routes(trace)
        used = multi_hot(trace.experts, trace.num_experts)
        before = multi_hot(previous, trace.num_experts)
        stayed = (used * before).sum(0, dtype=np.float64)  # [S, E]
        were = before.sum(0, dtype=np.float64)
        stay = stayed.sum(1, keepdims=True) / np.maximum(were.sum(1, keepdims=True), 1)
        new = (expert_counts(trace) - stayed) / np.maximum(trace.num_tokens - were, 1)
        self._stay = stay.astype(np.float32)
        self._new = np.minimum(new.astype(np.float32), _BELOW * self._stay)
        return None

    def _predict(self, request: Request, first: int, stop: int) -> Array:
        assert self.shape is not None
        before = multi_hot(request.previous, self.shape.num_experts)
        return self._of(before, self.shape.num_layers, self.shape.num_experts)[first:stop]

    def _of(self, before: Array, num_layers: int, num_experts: int) -> Array:
        stay = self._stay if self._stay is not None else np.float32(_UNFITTED_STAY)
        new = self._new if self._new is not None else np.zeros((num_layers, num_experts), "f4")
        return np.where(before > 0, stay, new)
