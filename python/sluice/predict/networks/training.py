"""What fitting any network takes: seeds, the learning rate's course, layers as named arrays."""

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


def anneal(optimizer: torch.optim.Optimizer, steps: int) -> torch.optim.lr_scheduler.LambdaLR:
    """A short warm-up, then half a cosine down to nothing after `steps`."""
    warm = min(_WARM_UP, max(steps // 5, 1))

    def factor(step: int) -> float:
        cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, step / max(steps, 1))))
        return min(1.0, (step + 1) / warm) * cosine

    return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


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
