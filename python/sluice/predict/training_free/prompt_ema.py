"""What the last prompts of a task used, fading by prompts: eMoE's predictor without a model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sluice.errors import ConfigError
from sluice.predict.base import Progress
from sluice.predict.prompts import PromptPredictor, PromptSettings
from sluice.trace import Trace

Array = NDArray[Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptEmaSettings(PromptSettings):
    """As `PromptSettings`, and how fast prompts fade.

    Args:
        keep: f <- keep f + (1 - keep) h after each prompt of a task.
    """

    keep: float = 0.7

    def __post_init__(self) -> None:
        PromptSettings.__post_init__(self)  # super() does not see through slots
        if not 0 <= self.keep < 1:
            raise ConfigError(f"keep: got {self.keep}, expected 0 or more and below 1")


class PromptEma(PromptPredictor[PromptEmaSettings]):
    """Moving average of prompt histograms per task, that of all tasks until a task has four."""

    name = "prompt-ema"
    settings_type = PromptEmaSettings

    _averages: dict[str, Array]

    def reset(self) -> None:
        """Forgets all prompts since the fit."""
        self._averages = {}
        super().reset()

    def state(self) -> dict[str, Array]:
        """`profiles` float32 `[1 + tasks, S, E]`, and the tasks' names."""
        return self._profile_state()

    def load_state(self, arrays: Mapping[str, Array]) -> None:
        """Takes what `state` gave."""
        self._load_profiles(arrays)

    def _fit(
        self, trace: Trace, choose: Trace | None, seed: int, progress: Progress
    ) -> Mapping[str, Any] | None:
        self._fit_profiles(trace)
        return {"tasks": [task for task in self._profiles if task]}

    def _learn(self, task: str, histogram: Array) -> None:
        before = self._averages.get(task, self._profile(task))
        keep = np.float32(self.settings.keep)
        self._averages[task] = keep * before + (1 - keep) * histogram

    def _whole(self, task: str) -> Array:
        return self._averages.get(task, self._profile(task))

    def _one_layer(self, task: str, layer: int, below: Array) -> Array:
        return self._whole(task)[layer]
