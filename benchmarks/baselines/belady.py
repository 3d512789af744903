"""Bounds of one run: its own future, told to the same engine by the same ways as a prediction."""

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from baselines.arm import Generation
from baselines.sluice_arm import SluiceArm
from sluice.predict import Guess, RoutingEvent
from sluice.simulate import Routes, next_use_scores


class BeladyArm(SluiceArm):
    """Keep-scores are the turns of each expert's next use, obeyed always: Belady's victims.

    A layer's row is published right before its experts run. It is exact to the end of the next
    generation, beyond which nobody is told.

    Args:
        hints: Also the token's true routes as hints when it begins, on the predictors' thread.
    """

    knows_future = True

    def __init__(
        self,
        mode: str,
        checkpoint: Path,
        scenario: dict[str, Any],
        share: float,
        *,
        hints: bool,
    ) -> None:
        super().__init__(mode, checkpoint, scenario, share, "pack", policy="forecast:always")
        self.routes = TrueRoutes() if hints else None
        self._scores = np.zeros((0, 0, 0), np.float32)
        self._first = 0  # forward of the generation
        self._forwards = 0

    def load(self) -> Any:
        model = super().load()
        sites = [m for n, m in model.named_modules() if n.endswith(".experts")]
        for layer, site in enumerate(sites):
            site.register_forward_pre_hook(self._publisher(layer))
        if self.routes is not None:
            model.sluice.predict(self.routes)
        return model

    def expect(self, generations: list[Generation]) -> None:
        steps = [step for each in generations for step in each.steps()]
        self._first = self._forwards
        session = self.model.sluice
        width = max(session.store.layer(i)["num_experts"] for i in range(session.store.num_layers))
        self._scores = turns_of(steps, width)
        if self.routes is not None:
            self.routes.expect(self._first, steps)

    def config(self) -> dict[str, Any]:
        return {**super().config(), "hints": "" if self.routes is None else self.routes.name}

    def _publisher(self, layer: int) -> Any:
        def publish(_module: Any, _args: Any) -> None:
            if layer == 0:
                self._forwards += 1
            step = self._forwards - 1 - self._first
            if step < len(self._scores):
                self.model.sluice.forecast(self._scores[step, layer][None], first_layer=layer)

        return publish


def turns_of(steps: Sequence[Sequence[np.ndarray]], num_experts: int) -> np.ndarray:
    """Keep-scores as of each visit, float32 `[steps, layers, E]`: minus the next use's turn."""
    if not steps:
        return np.zeros((0, 0, num_experts), np.float32)
    layers = len(steps[0])
    sets = [experts for step in steps for experts in step]
    routes = Routes(
        num_layers=layers,
        num_experts=num_experts,
        steps=np.repeat(np.arange(len(steps)), layers),
        layers=np.tile(np.arange(layers, dtype=np.int32), len(steps)),
        begins=np.array([0, *itertools.accumulate(len(s) for s in sets)], np.int64),
        experts=np.concatenate(sets).astype(np.int32),
        weights=None,
        rows=None,
        num_tokens=len(steps),
    )
    return next_use_scores(routes).reshape(len(steps), layers, num_experts)


class TrueRoutes:
    """A predictor that knows who each step asks for."""

    name = "true-routes"

    def __init__(self) -> None:
        self._told: tuple[int, list[list[np.ndarray]]] = (0, [])
        self._step = 0

    def expect(self, first_step: int, steps: list[list[np.ndarray]]) -> None:
        """Steps from `first_step` of the model on, as sets per layer."""
        self._told = first_step, steps

    def begin_step(self, step: int, requests: Any, token_ids: Any, tasks: Sequence[str]) -> None:
        self._step = step

    def observe(self, event: RoutingEvent) -> None:
        """It knows."""

    def plan(self, horizon: int) -> list[Guess]:
        first, steps = self._told
        at = self._step - first
        if not 0 <= at < len(steps):
            return []
        visits = enumerate(steps[at][:horizon])
        return [Guess(layer, int(e), 1.0, 0) for layer, experts in visits for e in experts]

    def forecast(self) -> None:
        """Keep-scores come by layer, before each."""
