"""sluice with a predictor that was fitted on other sequences."""

from pathlib import Path
from typing import Any

import numpy as np

from baselines.sluice_arm import SluiceArm
from fitted import fitted, passport
from sluice.predict import Guess

_COUNTED = ("plans_dropped", "plans_apart", "predictor_steps_lost", "predictor_failed")


class ForesightArm(SluiceArm):
    """A predictor follows the model, as `predictor=` has it.

    Args:
        kind: Which of the scenario's `[predictors]`.
        policy: Who leaves; "forecast" is what policy="auto" means beside a predictor.
        discarded: Plans are made and thrown away, so that what they cost is seen.
    """

    def __init__(
        self,
        mode: str,
        checkpoint: Path,
        scenario: dict[str, Any],
        share: float,
        *,
        kind: str,
        policy: str,
        discarded: bool = False,
    ) -> None:
        super().__init__(mode, checkpoint, scenario, share, "pack", policy=policy)
        self.kind = kind
        self.table: dict[str, Any] = scenario["predictors"][kind]
        self.discarded = discarded
        self.predictor: Any = None

    def load(self) -> Any:
        self.predictor = fitted(self.kind, self.table)
        model = super().load()
        model.sluice.predict(Discarded(self.predictor) if self.discarded else self.predictor)
        return model

    def counters(self) -> dict[str, Any]:
        counters = super().counters()
        degraded = counters.get("degradations", {})
        return {**counters, **{name: degraded.get(name, 0) for name in _COUNTED}}

    def config(self) -> dict[str, Any]:
        predictor = passport(self.kind, self.table, self.predictor)
        return {**super().config(), "predictor": predictor, "discarded": self.discarded}


class Discarded:
    """A predictor that thinks as its inner one does, and says nothing."""

    def __init__(self, inner: Any) -> None:
        self._inner = inner
        self.name: str = inner.name
        self.shape = inner.shape
        self.needs_hidden = inner.needs_hidden
        self.begin_step = inner.begin_step
        self.observe = inner.observe

    def upcoming(self, horizon: int) -> Any:
        return np.zeros_like(self._inner.upcoming(horizon))

    def plan(self, horizon: int) -> list[Guess]:
        self._inner.plan(horizon)
        return []

    def forecast(self) -> None:
        self._inner.forecast()
