"""The next layers' own gates, run early on the state at hand: look-ahead without training.

Sources: Pre-gated MoE (2308.12066) for the idea; the norm of the layer that is predicted and a
calibrated mean of what is added to the residual stream in between (2603.19289) for the correction:
`gate[l + h](norm[l + h](x + v))`, x the residual stream at layer l's router.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sluice.errors import ConfigError
from sluice.predict.arrays import multi_hot, take
from sluice.predict.base import BasePredictor, Progress, Shape
from sluice.predict.live import Request
from sluice.predict.offline import Horizon, known_layers
from sluice.predict.training_free.counting import check_rates, expert_rates
from sluice.predict.training_free.router_weights import RouterWeights
from sluice.trace import Trace

Array = NDArray[Any]

_NEWTON_STEPS = 25
_MAX_CALIBRATION_TOKENS = 8192


@dataclass(frozen=True, slots=True, kw_only=True)
class NextGateSettings:
    """How far the gates look.

    Args:
        max_layers: Layers ahead; what is further gets the rates of all tokens.
    """

    max_layers: int = 3

    def __post_init__(self) -> None:
        if not 1 <= self.max_layers <= 8:
            raise ConfigError(f"max_layers: got {self.max_layers}, expected 1 to 8")


class NextGate(BasePredictor[NextGateSettings]):
    """True gates on an early state; make it with `NextGate.from_model(model)`.

    It works as it is, with nothing added between layers; a fit on a trace with hidden states adds
    the mean step, and turns distances from the k-th largest choice into probabilities.

    Args:
        settings: As for every predictor.
        routers: Of the model.
    """

    name = "next-gate"
    settings_type = NextGateSettings
    needs_hidden = True
    needs_fit = False

    def __init__(
        self, settings: NextGateSettings | None = None, routers: RouterWeights | None = None
    ) -> None:
        super().__init__(settings)
        self._routers = routers
        self._rates: Array | None = None  # [S, E]
        self._steps: Array | None = None  # [D, S, H], to layer s from D + 1 before
        self._curves: Array | None = None  # [D, S, 2]: slope and offset of the logistic

    @classmethod
    def from_model(
        cls, model: Any, *, top_k: int, settings: NextGateSettings | None = None
    ) -> NextGate:
        """With the routers of a transformers model, offloaded or not.

        Args:
            model: Its experts are of a structure that sluice knows.
            top_k: Experts of a token.
            settings: How far to look.

        Raises:
            UnsupportedModelError: A router is none that reads what its experts read.
        """
        from sluice.hf.router_probe import router_weights

        routers = router_weights(model)
        made = cls(settings, routers)
        made.bind(Shape(routers.gate.shape[0], routers.gate.shape[1], top_k))
        return made

    def scores(self, trace: Trace, horizon: Horizon) -> Array:
        """As the base says; layers that no state of the token precedes get all tokens' rates."""
        self.check(trace)
        known_layers(horizon, trace.num_layers)
        shape = (trace.num_tokens, trace.num_layers, trace.num_experts)
        found = np.broadcast_to(self._prior(), shape).copy()
        if horizon == "token" or horizon > self.settings.max_layers or self._routers is None:
            return found
        assert trace.hidden is not None
        for layer in range(horizon, trace.num_layers):
            hidden = trace.hidden[:, layer - horizon].astype(np.float32)
            found[:, layer] = self._look(hidden, layer, horizon)
        return found

    def state(self) -> dict[str, Array]:
        """Routers, `rates`, `steps`, `curves`."""
        assert self._routers is not None
        arrays = self._routers.state()
        fitted = {"rates": self._rates, "steps": self._steps, "curves": self._curves}
        return arrays | {name: array for name, array in fitted.items() if array is not None}

    def core_tables(self) -> tuple[str, dict[str, Any]] | None:
        """What the core's scorer needs to look ahead inside of a forward; None without gates."""
        if self._routers is None or self.shape is None:
            return None
        layers, experts, width = self._routers.gate.shape
        far = self.settings.max_layers
        steps = np.zeros((far, layers, width), np.float32) if self._steps is None else self._steps
        curves = np.tile(np.array([1, 0], np.float32), (far, layers, 1))
        arrays = self._routers.state() | {
            "steps": steps,
            "curves": curves if self._curves is None else self._curves,
        }
        flags = {name: arrays[name].astype(np.uint8) for name in ("sigmoid", "centred")}
        return "gates", {
            **arrays,
            **flags,
            "num_layers": layers,
            "num_experts": experts,
            "width": width,
            "max_layers": far,
            "top_k": self.shape.top_k,
        }

    def load_state(self, arrays: Mapping[str, Array]) -> None:
        """Takes what `state` gave."""
        assert self.shape is not None
        layers, experts = self.shape.num_layers, self.shape.num_experts
        self._routers = RouterWeights.of_state(arrays, layers, experts)
        width, far = self._routers.gate.shape[2], self.settings.max_layers
        if "rates" in arrays:
            self._rates = check_rates("rates", take(arrays, "rates", (layers, experts)))
            self._steps = take(arrays, "steps", (far, layers, width))
            self._curves = take(arrays, "curves", (far, layers, 2))

    def bind(self, shape: Shape) -> None:
        """Says what will be predicted for.

        Raises:
            ConfigError: The routers are of another shape.
        """
        if self._routers is not None:
            layers, experts, _ = self._routers.gate.shape
            if (layers, experts) != (shape.num_layers, shape.num_experts):
                raise ConfigError(
                    f"next-gate: got {shape} with the routers of {layers} layers x {experts} "
                    "experts, expected the model's own trace"
                )
        super().bind(shape)

    def _fit(
        self, trace: Trace, choose: Trace | None, seed: int, progress: Progress
    ) -> Mapping[str, Any] | None:
        if self._routers is None:
            raise ConfigError(
                "next-gate: got no gates, expected a model's; make it with "
                "NextGate.from_model(model), or give `sluice train` the model's folder"
            )
        assert trace.hidden is not None
        layers, _, width = self._routers.gate.shape
        if trace.hidden.shape[2] != width:
            raise ConfigError(
                f"next-gate: got states of width {trace.hidden.shape[2]}, expected {width}"
            )
        far = self.settings.max_layers
        self._rates = expert_rates(trace)
        self._steps = np.zeros((far, layers, width), np.float32)
        self._curves = np.tile(np.array([1, 0], np.float32), (far, layers, 1))
        states = [
            self._routers.normal_states(trace.hidden[:, layer].astype(np.float32), layer)
            for layer in range(layers)
        ]
        for ahead in range(1, far + 1):
            for layer in range(ahead, layers):
                self._steps[ahead - 1, layer] = (states[layer] - states[layer - ahead]).mean(0)
            progress(ahead, 2 * far)
        held = trace if choose is None else choose
        rows = np.random.default_rng(seed).permutation(held.num_tokens)[:_MAX_CALIBRATION_TOKENS]
        for ahead in range(1, far + 1):
            for layer in range(ahead, layers):
                assert held.hidden is not None
                hidden = held.hidden[rows, layer - ahead].astype(np.float32)
                margins = self._margins(hidden, layer, ahead)
                used = multi_hot(held.experts[rows, layer], held.num_experts)
                self._curves[ahead - 1, layer] = _logistic(margins.ravel(), used.ravel())
            progress(far + ahead, 2 * far)
        return {"calibrated_on": "fit" if choose is None else "choose"}

    def _predict(self, request: Request, first: int, stop: int) -> Array:
        found = self._prior()[first:stop].copy()
        if request.hidden is None or self._routers is None:
            return found
        for layer in range(first, min(stop, request.layer + self.settings.max_layers)):
            ahead = layer - request.layer + 1
            found[layer - first] = self._look(request.hidden[None], layer, ahead)[0]
        return found

    def _prior(self) -> Array:
        assert self.shape is not None
        if self._rates is not None:
            return self._rates
        return np.zeros((self.shape.num_layers, self.shape.num_experts), np.float32)

    def _look(self, hidden: Array, layer: int, ahead: int) -> Array:
        """Probabilities `[N, E]` of `layer` from states that entered the experts `ahead` before."""
        slope, offset = (1, 0) if self._curves is None else self._curves[ahead - 1, layer]
        return _sigmoid(slope * self._margins(hidden, layer, ahead) + offset)

    def _margins(self, hidden: Array, layer: int, ahead: int) -> Array:
        """How far each expert is above what the k-th and the next choice have in the middle."""
        assert self._routers is not None and self.shape is not None
        state = self._routers.normal_states(hidden, layer - ahead)
        if self._steps is not None:
            state = state + self._steps[ahead - 1, layer]
        choices = self._routers.choices(state, layer)
        k, experts = self.shape.top_k, self.shape.num_experts
        edge = np.partition(choices, [experts - k, max(experts - k - 1, 0)], axis=-1)
        middle = (edge[:, experts - k] + edge[:, max(experts - k - 1, 0)]) / 2
        return choices - middle[:, None]


def _sigmoid(values: Array) -> Array:
    return (1 / (1 + np.exp(-np.clip(values, -30, 30)))).astype(np.float32)


def _logistic(margins: Array, used: Array) -> Array:
    """Slope and offset that make `sigmoid(slope m + offset)` most likely, by Newton's method."""
    scale = max(float(np.std(margins)), 1e-6)  # choices of sigmoids lie within thousandths
    inputs = np.stack([margins / scale, np.ones_like(margins)], axis=1).astype(np.float64)
    weights = np.array([1.0, 0.0])
    for _ in range(_NEWTON_STEPS):
        guess = 1 / (1 + np.exp(-np.clip(inputs @ weights, -30, 30)))
        curvature = inputs * (guess * (1 - guess))[:, None]
        # The ridge keeps a perfect prediction's slope finite.
        matrix = curvature.T @ inputs + 1e-3 * np.eye(2)
        step = np.linalg.solve(matrix, inputs.T @ (used - guess) - 1e-3 * weights)
        weights = weights + np.clip(step, -2, 2)
    return np.array([max(weights[0], 1e-3) / scale, weights[1]], np.float32)
