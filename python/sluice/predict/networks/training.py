"""What fitting takes: seeds, the optimiser and its early stop, layers as named arrays."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Generator, Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from sluice.errors import ConfigError
from sluice.predict.arrays import take

Array = NDArray[Any]

_WARM_UP = 100


@contextlib.contextmanager
def seeded(seed: int) -> Generator[None]:
    """Torch draws from this seed inside, and goes on as it was outside."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


class Descent:
    """AdamW with clipped gradients; keeps the parameters that were best on the way.

    The learning rate warms up shortly, then falls along half a cosine to nothing.

    Args:
        module: Whose parameters.
        settings: With `learning_rate` and `weight_decay`.
        steps: How many there will be.
        decays_vectors: Whether biases and other parameters of one dimension decay, too.
    """

    def __init__(
        self, module: nn.Module, settings: Any, steps: int, *, decays_vectors: bool = True
    ) -> None:
        self._module = module
        parameters = list(module.parameters())
        plain = [p for p in parameters if p.ndim <= 1 and not decays_vectors]
        decayed = [p for p in parameters if p.ndim > 1 or decays_vectors]
        self._optimizer = torch.optim.AdamW(
            [
                {"params": decayed, "weight_decay": settings.weight_decay},
                {"params": plain, "weight_decay": 0.0},
            ],
            lr=settings.learning_rate,
        )
        warm = min(_WARM_UP, max(steps // 5, 1))

        def factor(step: int) -> float:
            cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, step / max(steps, 1))))
            return min(1.0, (step + 1) / warm) * cosine

        self._schedule = torch.optim.lr_scheduler.LambdaLR(self._optimizer, factor)
        self._losses: list[float] = []
        self._best: tuple[float, dict[str, Array]] | None = None

    def step(self, loss: torch.Tensor) -> None:
        """One step down a loss."""
        self._optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self._module.parameters(), 1.0)
        self._optimizer.step()
        self._schedule.step()
        self._losses.append(float(loss.detach()))

    def mean_loss(self) -> float:
        """Of the steps since it was asked last."""
        losses, self._losses = self._losses, []
        return float(np.mean(losses))

    def keep_if_best(self, missed: float) -> bool:
        """Whether the parameters miss less than ever before, on sequences to choose on."""
        if self._best is not None and not missed < self._best[0]:
            return False
        self._best = (missed, module_state(self._module))
        return True

    def restore_best(self) -> None:
        """The best parameters that were kept, if any were; for use, not for training."""
        if self._best is not None:
            load_module(self._module, self._best[1])
        self._module.eval()


def module_state(module: nn.Module) -> dict[str, Array]:
    """Copies of a module's parameters by name."""
    return {name: t.detach().numpy().copy() for name, t in module.state_dict().items()}


def load_module(module: nn.Module, arrays: Mapping[str, Array]) -> None:
    """Fills a module from what `module_state` gave; other arrays may lie beside.

    Raises:
        CheckpointError: An array is missing, of another shape, or not finite.
    """
    module.load_state_dict(
        {
            name: torch.from_numpy(take(arrays, name, tuple(t.shape)).copy())
            for name, t in module.state_dict().items()
        }
    )


def check_ranges(
    settings: Any, *, at_least_one: tuple[str, ...] = (), shares: tuple[str, ...] = ()
) -> None:
    """Refuses settings that can never work; rates and decays are checked where they are there.

    Raises:
        ConfigError: A count below one, or a share outside of 0 to 1.
    """
    for name in at_least_one:
        value = getattr(settings, name)
        if type(value) is not int or value < 1:
            raise ConfigError(f"{name}: got {value!r}, expected a number of at least 1")
    for name in shares:
        value = getattr(settings, name)
        if not 0 <= value < 1:
            raise ConfigError(f"{name}: got {value!r}, expected 0 or more and below 1")
    if not settings.learning_rate > 0 or not np.isfinite(settings.learning_rate):
        raise ConfigError(f"learning_rate: got {settings.learning_rate!r}, expected above 0")
    if not settings.weight_decay >= 0:
        raise ConfigError(f"weight_decay: got {settings.weight_decay!r}, expected 0 or more")
