"""What the sequence used lately: counts with a half-life, on top of what is popular."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sluice.predict.arrays import take
from sluice.predict.base import BasePredictor, Progress
from sluice.predict.live import Request
from sluice.predict.offline import Horizon, known_layers
from sluice.predict.training_free.counting import check_rates, expert_rates
from sluice.predict.training_free.decayed import DecayedCounts, check_positive
from sluice.trace import Trace

Array = NDArray[Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class DecayedFrequencySettings:
    """How fast to forget.

    Args:
        half_life: Tokens after which a use counts half.
        prior_tokens: Weight of the fitted rates, in tokens; without a fit the prior is 0.
    """

    half_life: float = 16.0
    prior_tokens: float = 1.0

    def __post_init__(self) -> None:
        check_positive(half_life=self.half_life, prior_tokens=self.prior_tokens)


class DecayedFrequency(BasePredictor[DecayedFrequencySettings]):
    """The running sequence's decayed rates. Works without a fit."""

    name = "decayed-frequency"
    settings_type = DecayedFrequencySettings
    needs_fit = False

    _rates: Array | None = None  # [S, E]

    def scores(self, trace: Trace, horizon: Horizon) -> Array:
        """As the base says; the horizon changes nothing."""
        self.check(trace)
        known_layers(horizon, trace.num_layers)
        layers, experts = trace.num_layers, trace.num_experts
        prior, weight = self._prior(layers, experts), self.settings.prior_tokens
        found = np.empty((trace.num_tokens, layers, experts), np.float32)
        for sequence in trace.sequences:
            running = DecayedCounts(layers, experts, self.settings.half_life)
            for row in range(sequence.start, sequence.start + sequence.length):
                found[row] = running.blend(prior, weight)
                running.add(trace.experts[row])
        return found

    def forecast(self) -> Array | None:
        """Rates of all running requests, added up."""
        running = [] if self._live is None else self._live.running
        found = [self._predict(request, 0, len(request.previous)) for request in running]
        return np.sum(found, axis=0) if found else self._rates

    def state(self) -> dict[str, Array]:
        """`rates` float32 `[S, E]`."""
        return {} if self._rates is None else {"rates": self._rates}

    def load_state(self, arrays: Mapping[str, Array]) -> None:
        """Takes what `state` gave."""
        assert self.shape is not None
        if arrays:
            shape = (self.shape.num_layers, self.shape.num_experts)
            self._rates = check_rates("rates", take(arrays, "rates", shape))

    def _fit(
        self, trace: Trace, choose: Trace | None, seed: int, progress: Progress
    ) -> Mapping[str, Any] | None:
        self._rates = expert_rates(trace)
        return None

    def _begin(self, request: Request) -> None:
        assert self.shape is not None
        layers, experts = self.shape.num_layers, self.shape.num_experts
        request.memory = DecayedCounts(layers, experts, self.settings.half_life)

    def _predict(self, request: Request, first: int, stop: int) -> Array:
        assert self.shape is not None
        prior = self._prior(self.shape.num_layers, self.shape.num_experts)[first:stop]
        return request.memory.blend(prior, self.settings.prior_tokens, slice(first, stop))

    def _finish(self, request: Request) -> None:
        request.memory.add(request.routes)

    def _prior(self, num_layers: int, num_experts: int) -> Array:
        return np.zeros((num_layers, num_experts), "f4") if self._rates is None else self._rates
