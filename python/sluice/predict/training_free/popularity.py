"""The experts that are popular, per layer and, where asked, per task: the baseline of baselines."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sluice.predict.arrays import multi_hot, names_as_array, names_of_array, take
from sluice.predict.base import BasePredictor, Progress
from sluice.predict.live import Request
from sluice.predict.offline import Horizon, known_layers
from sluice.predict.training_free.counting import check_rates
from sluice.predict.training_free.decayed import check_positive
from sluice.trace import Trace

Array = NDArray[Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class PopularitySettings:
    """How to count.

    Args:
        by_task: Rates of their own for tasks that were fitted; other tasks get those of all.
        prior_tokens: Weight of the rates of all in a task's own, in tokens.
    """

    by_task: bool = False
    prior_tokens: float = 32.0

    def __post_init__(self) -> None:
        check_positive(prior_tokens=self.prior_tokens)


class Popularity(BasePredictor[PopularitySettings]):
    """The share of fitted tokens that used an expert, whatever the token at hand."""

    name = "popularity"
    settings_type = PopularitySettings

    _rates: Array | None = None  # [1 + tasks, S, E], those of all tasks first
    _tasks: Mapping[str, int] = {}

    def scores(self, trace: Trace, horizon: Horizon) -> Array:
        """As the base says; the horizon changes nothing."""
        self.check(trace)
        known_layers(horizon, trace.num_layers)
        found = np.empty((trace.num_tokens, trace.num_layers, trace.num_experts), np.float32)
        for sequence in trace.sequences:
            found[sequence.rows] = self._of(sequence.task)
        return found

    def forecast(self) -> Array | None:
        """The rates of all tasks."""
        return None if self._rates is None else self._rates[0]

    def state(self) -> dict[str, Array]:
        """`rates` float32 `[1 + tasks, S, E]`, those of all first, and the tasks' names."""
        assert self._rates is not None
        return {"rates": self._rates, "tasks": names_as_array(list(self._tasks))}

    def load_state(self, arrays: Mapping[str, Array]) -> None:
        """Takes what `state` gave."""
        assert self.shape is not None
        tasks = names_of_array(arrays, "tasks")
        shape = (1 + len(tasks), self.shape.num_layers, self.shape.num_experts)
        self._rates = check_rates("rates", take(arrays, "rates", shape))
        self._tasks = {task: i + 1 for i, task in enumerate(tasks)}

    def _fit(
        self, trace: Trace, choose: Trace | None, seed: int, progress: Progress
    ) -> Mapping[str, Any] | None:
        counts: dict[str, Array] = {}
        tokens: dict[str, int] = {}
        for done, sequence in enumerate(trace.sequences):
            used = multi_hot(trace.experts[sequence.rows], trace.num_experts).sum(axis=0)
            counts[sequence.task] = counts.get(sequence.task, 0) + used
            tokens[sequence.task] = tokens.get(sequence.task, 0) + sequence.length
            progress(done + 1, len(trace.sequences))
        everything = sum(counts.values(), np.zeros(trace.experts.shape[1:2], np.float32)[:, None])
        rates = [everything / max(trace.num_tokens, 1)]
        prior = self.settings.prior_tokens
        self._tasks = {}
        if self.settings.by_task:
            for task, used in counts.items():
                self._tasks = {**self._tasks, task: len(rates)}
                rates.append((used + prior * rates[0]) / (tokens[task] + prior))
        self._rates = np.stack(rates).astype(np.float32)
        return None

    def _predict(self, request: Request, first: int, stop: int) -> Array:
        return self._of(request.task)[first:stop]

    def _of(self, task: str) -> Array:
        if self._rates is None:
            assert self.shape is not None
            return np.zeros((self.shape.num_layers, self.shape.num_experts), np.float32)
        return self._rates[self._tasks.get(task, 0)]
