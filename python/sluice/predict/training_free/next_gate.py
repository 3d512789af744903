"""The next layers' own gates, run early on the state at hand: look-ahead without training.

Sources: Pre-gated MoE (2308.12066) for the idea; the norm of the layer that is predicted and a
calibrated mean of what is added to the residual stream in between (2603.19289) for the correction:
`gate[l + h](norm[l + h](x + v))`, x the residual stream at layer l's router. Ours: a mean for every
token id that was seen, backed off to that of all tokens; the first layers add what the token says.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sluice.errors import ConfigError
from sluice.predict.arrays import ids_of, multi_hot, rows_of, take
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
        max_tokens: Token ids with a mean step of their own, the most frequent ones; each takes
            2 S H bytes. 0: one mean for all.
        back_off: Weight of the mean of all tokens in a token's own, in occurrences.
    """

    max_layers: int = 3
    max_tokens: int = 2048
    back_off: float = 0.5

    def __post_init__(self) -> None:
        if not 1 <= self.max_layers <= 8:
            raise ConfigError(f"max_layers: got {self.max_layers}, expected 1 to 8")
        if self.max_tokens < 0 or self.back_off <= 0:
            raise ConfigError(
                f"next-gate: got max_tokens {self.max_tokens} and back_off {self.back_off}, "
                "expected 0 or more and more than 0"
            )


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
        self._ids: Array = np.zeros(0, np.int64)  # [U], ascending
        self._means: Array | None = None  # float16 [U + 1, S, H]: normal states; of all tokens last
        self._curves: Array | None = None  # [D, S, 2, 2]: see `_fit_curves`

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
        ids = ids_of(trace)
        for layer in range(horizon, trace.num_layers):
            hidden = trace.hidden[:, layer - horizon].astype(np.float32)
            found[:, layer] = self._look(hidden, ids, layer, horizon)
        return found

    def state(self) -> dict[str, Array]:
        """Routers and, where it was fitted, `rates`, `ids`, `means`, `curves`."""
        assert self._routers is not None
        arrays = self._routers.state()
        if self._rates is None or self._means is None or self._curves is None:
            return arrays
        fitted = {"rates": self._rates, "ids": self._ids, "means": self._means}
        return arrays | fitted | {"curves": self._curves}

    def core_tables(self) -> tuple[str, dict[str, Any]] | None:
        """What the core's scorer needs to look ahead inside of a forward; None without gates."""
        if self._routers is None or self.shape is None:
            return None
        layers, experts, width = self._routers.gate.shape
        far = self.settings.max_layers
        ids = np.zeros(0, np.int64)
        means = np.zeros((1, layers, width), np.float16)
        curves = np.tile(np.array([1, 0], np.float32), (far, layers, 2, 1))
        if self._means is not None and self._curves is not None:
            ids, means, curves = self._ids, self._means, self._curves
        arrays = self._routers.state() | {"ids": ids, "means": means.view(np.uint16)}
        flags = {name: arrays[name].astype(np.uint8) for name in ("sigmoid", "centred")}
        return "gates", {
            **arrays,
            **flags,
            "curves": curves,
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
            self._ids = take(arrays, "ids", (-1,), np.int64)
            rows = len(self._ids) + 1
            self._means = take(arrays, "means", (rows, layers, width), np.float16)
            self._curves = take(arrays, "curves", (far, layers, 2, 2))

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
        width = self._routers.gate.shape[2]
        if trace.hidden.shape[2] != width:
            raise ConfigError(
                f"next-gate: got states of width {trace.hidden.shape[2]}, expected {width}"
            )
        self._rates = expert_rates(trace)
        self._ids, self._means = self._mean_states(trace)
        progress(0, 1)
        self._fit_curves(trace if choose is None else choose, seed)
        progress(1, 1)
        return {"calibrated_on": "fit" if choose is None else "choose"}

    def _predict(self, request: Request, first: int, stop: int) -> Array:
        found = self._prior()[first:stop].copy()
        if request.hidden is None or self._routers is None:
            return found
        ids = np.array([request.token_id])
        for layer in range(first, min(stop, request.layer + self.settings.max_layers)):
            ahead = layer - request.layer + 1
            found[layer - first] = self._look(request.hidden[None], ids, layer, ahead)[0]
        return found

    def _prior(self) -> Array:
        assert self.shape is not None
        if self._rates is not None:
            return self._rates
        return np.zeros((self.shape.num_layers, self.shape.num_experts), np.float32)

    def _mean_states(self, trace: Trace) -> tuple[Array, Array]:
        """Ids with a mean of their own, and normal states by id and layer, those of all last."""
        assert self._routers is not None and trace.hidden is not None
        layers, _, width = self._routers.gate.shape
        seen, owner, times = np.unique(ids_of(trace), return_inverse=True, return_counts=True)
        often = np.argsort(-times, kind="stable")[: self.settings.max_tokens]
        kept = np.sort(often[seen[often] >= 0])
        place = np.full(len(seen), -1)
        place[kept] = np.arange(len(kept))
        row = place[owner.reshape(-1)]
        back = np.float32(self.settings.back_off)
        means = np.empty((len(kept) + 1, layers, width), np.float16)
        for layer in range(layers):
            states = self._routers.normal_states(trace.hidden[:, layer].astype(np.float32), layer)
            overall = states.mean(0)
            sums = np.broadcast_to(back * overall, (len(kept), width)).astype(np.float32)
            np.add.at(sums, row[row >= 0], states[row >= 0])
            means[:-1, layer] = sums / (times[kept].astype(np.float32) + back)[:, None]
            means[-1, layer] = overall
        return seen[kept], means

    def _fit_curves(self, held: Trace, seed: int) -> None:
        """Slope and offset of the logistic by layers ahead, layer and kind of token.

        Kind 0 has a mean step of its own, kind 1 that of all tokens, and is less sure.
        """
        assert self._routers is not None and held.hidden is not None
        far, layers = self.settings.max_layers, held.num_layers
        curves = np.tile(np.array([1, 0], np.float32), (far, layers, 2, 1))
        rows = np.random.default_rng(seed).permutation(held.num_tokens)[:_MAX_CALIBRATION_TOKENS]
        own = ids_of(held)[rows]
        known = np.isin(own, self._ids)
        for ahead in range(1, far + 1):
            for layer in range(ahead, layers):
                hidden = held.hidden[rows, layer - ahead].astype(np.float32)
                used = multi_hot(held.experts[rows, layer], held.num_experts)
                for kind, ids in ((1, np.full_like(own, -1)), (0, own)):
                    some = np.ones_like(known) if kind == 1 or not known.any() else known
                    margins = self._margins(hidden[some], ids[some], layer, ahead)
                    found = _logistic(margins.ravel(), used[some].ravel())
                    curves[ahead - 1, layer, kind] = found
        self._curves = curves

    def _step(self, ids: Array, layer: int, ahead: int) -> Array:
        """What is added on the mean on the way to `layer`, for token ids `[N]`: `[N, H]`."""
        assert self._means is not None
        row = rows_of(ids, self._ids)
        here, there = self._means[row, layer - ahead], self._means[row, layer]
        return there.astype(np.float32) - here.astype(np.float32)

    def _look(self, hidden: Array, ids: Array, layer: int, ahead: int) -> Array:
        """Probabilities `[N, E]` of `layer` from states that entered the experts `ahead` before."""
        margins = self._margins(hidden, ids, layer, ahead)
        if self._curves is None:
            return _sigmoid(margins)
        kind = np.where(np.isin(ids, self._ids), 0, 1)
        slope, offset = self._curves[ahead - 1, layer, kind].T
        return _sigmoid(slope[:, None] * margins + offset[:, None])

    def _margins(self, hidden: Array, ids: Array, layer: int, ahead: int) -> Array:
        """How far each expert is above what the k-th and the next choice have in the middle."""
        assert self._routers is not None and self.shape is not None
        state = self._routers.normal_states(hidden, layer - ahead)
        if self._means is not None:
            state = state + self._step(ids, layer, ahead)
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
