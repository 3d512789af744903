"""A model's routers as arrays: enough to run the next layers' gates early."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sluice.errors import CheckpointError, ConfigError
from sluice.predict.arrays import take

Array = NDArray[Any]

_TINY = 1e-6


@dataclass(frozen=True, slots=True, kw_only=True)
class RouterWeights:
    """Gates of all MoE layers and the norms in front of them.

    A layer chooses the largest of `f(gate y + bias) + correction`, y what enters its experts, f the
    sigmoid where `sigmoid`, else nothing (a softmax keeps the order). y is `scale x + shift`, x the
    residual stream brought to mean square 1 (and, where `centred`, mean 0).

    Args:
        gate: float32 `[S, E, H]`.
        bias: float32 `[S, E]`.
        correction: float32 `[S, E]`.
        sigmoid: bool `[S]`.
        scale: float32 `[S, H]`.
        shift: float32 `[S, H]`.
        centred: bool `[S]`.
    """

    gate: Array
    bias: Array
    correction: Array
    sigmoid: Array
    scale: Array
    shift: Array
    centred: Array

    def __post_init__(self) -> None:
        if self.gate.ndim != 3:
            raise ConfigError(
                f"router weights: got gates of shape {list(self.gate.shape)}, expected [S, E, H]"
            )
        for name, (shape, _) in _expected(self.gate.shape).items():
            got = getattr(self, name).shape
            if got != shape:
                raise ConfigError(
                    f"router weights: got {name} of shape {list(got)}, expected {list(shape)}"
                )

    @classmethod
    def plain(cls, gate: Array) -> RouterWeights:
        """Gates `[S, E, H]` without biases, behind norms that only normalise."""
        layers, experts, hidden = gate.shape
        return cls(
            gate=gate.astype(np.float32),
            bias=np.zeros((layers, experts), np.float32),
            correction=np.zeros((layers, experts), np.float32),
            sigmoid=np.zeros(layers, np.bool_),
            scale=np.ones((layers, hidden), np.float32),
            shift=np.zeros((layers, hidden), np.float32),
            centred=np.zeros(layers, np.bool_),
        )

    def normal_states(self, hidden: Array, layer: int) -> Array:
        """X of states `[..., H]` that entered the experts of `layer`; channels of scale 0 are 0."""
        scale = self.scale[layer]
        usable = np.abs(scale) > _TINY
        return np.where(usable, (hidden - self.shift[layer]) / np.where(usable, scale, 1), 0)

    def choices(self, states: Array, layer: int) -> Array:
        """What `layer` would choose the largest of, for a residual stream `[..., H]`."""
        if self.centred[layer]:
            states = states - states.mean(-1, keepdims=True)
        size = np.sqrt(np.square(states).mean(-1, keepdims=True))
        entering = self.scale[layer] * (states / np.maximum(size, _TINY)) + self.shift[layer]
        return self.choices_of_entering(entering, layer)

    def choices_of_entering(self, entering: Array, layer: int) -> Array:
        """As `choices`, for what enters the experts of `layer` itself."""
        logits = entering @ self.gate[layer].T + self.bias[layer]
        if self.sigmoid[layer]:
            logits = 1 / (1 + np.exp(-logits))
        return logits + self.correction[layer]

    def state(self) -> dict[str, Array]:
        """Its arrays by name."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    @classmethod
    def of_state(
        cls, arrays: Mapping[str, Array], num_layers: int, num_experts: int
    ) -> RouterWeights:
        """From arrays that `state` gave.

        Raises:
            CheckpointError: They do not fit.
        """
        shape = take(arrays, "gate", (num_layers, num_experts, -1)).shape
        expected = {"gate": (shape, np.float32), **_expected(shape)}
        found = {name: take(arrays, name, *what) for name, what in expected.items()}
        if shape[-1] == 0:
            raise CheckpointError("predictor: got gates of states without a width")
        return cls(**found)


def _expected(gate: tuple[int, ...]) -> dict[str, tuple[tuple[int, ...], Any]]:
    layers, experts, hidden = gate
    return {
        "bias": ((layers, experts), np.float32),
        "correction": ((layers, experts), np.float32),
        "sigmoid": ((layers,), np.bool_),
        "scale": ((layers, hidden), np.float32),
        "shift": ((layers, hidden), np.float32),
        "centred": ((layers,), np.bool_),
    }
