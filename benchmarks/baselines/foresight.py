"""sluice with a predictor that was fitted on other sequences."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from baselines.sluice_arm import SluiceArm
from fitted import fitted, passport
from sluice.predict import Guess

_COUNTED = ("plans_dropped", "plans_apart", "predictor_steps_lost", "predictor_failed")


class ForesightArm(SluiceArm):
    """Predictors follow the model, as `predictor=` has it.

    Args:
        kinds: Which of the scenario's `[predictors]`.
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
        kinds: Sequence[str],
        policy: str,
        discarded: bool = False,
    ) -> None:
        super().__init__(mode, checkpoint, scenario, share, "pack", policy=policy)
        self.tables: dict[str, dict[str, Any]] = {
            kind: scenario["predictors"][kind] for kind in kinds
        }
        self.discarded = discarded
        self.predictors: list[Any] = []

    def load(self) -> Any:
        self.predictors = [
            fitted(kind, table, self.checkpoint) for kind, table in self.tables.items()
        ]
        if self.discarded and any(_runs_inside(each) for each in self.predictors):
            raise ValueError(f"{self.mode}: runs inside of forwards; see resident-foresight")
        model = super().load()
        for each in self.predictors:
            model.sluice.predict(Discarded(each) if self.discarded else each)
        return model

    def counters(self) -> dict[str, Any]:
        counters = super().counters()
        degraded = counters.get("degradations", {})
        return {**counters, **{name: degraded.get(name, 0) for name in _COUNTED}}

    def config(self) -> dict[str, Any]:
        passports = [
            passport(kind, table, predictor)
            for (kind, table), predictor in zip(self.tables.items(), self.predictors, strict=True)
        ]
        return {**super().config(), "predictors": passports, "discarded": self.discarded}


def _runs_inside(predictor: Any) -> bool:
    return getattr(predictor, "core_tables", lambda: None)() is not None


class Discarded:
    """A predictor of the thread that thinks as its inner one does, and says nothing."""

    def __init__(self, inner: Any) -> None:
        self._inner = inner
        self.name: str = inner.name
        self.shape = inner.shape
        self.needs_hidden = inner.needs_hidden
        self.prompt_tokens = getattr(inner, "prompt_tokens", None)
        self.begin_step = inner.begin_step
        self.observe = inner.observe

    def upcoming(self, horizon: int) -> Any:
        return np.zeros_like(self._inner.upcoming(horizon))

    def plan(self, horizon: int) -> list[Guess]:
        self._inner.plan(horizon)
        return []

    def forecast(self) -> None:
        self._inner.forecast()
