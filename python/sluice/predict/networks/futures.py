"""What followed tokens like the one at hand: how soon each of their experts was used again.

What may be read: a row of the running sequence counts once its `WINDOW` tokens of future are over,
rows of earlier sequences at once, so a score reads nothing later than its own token and layer.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from sluice.predict.arrays import multi_hot
from sluice.predict.networks.neighbours import (
    Likeness,
    LiveAlike,
    Looking,
    Stretch,
    average_over_alike,
)

Array = NDArray[Any]

WINDOW = 16
"""Tokens that the future of a row is followed for."""
DISCOUNTS = (0.5, 0.8, 0.9)


def next_uses_within(rows: Stretch) -> Array:
    """uint8 `[M, S, E]`: tokens until the next use in the sequence, 0 for none in `WINDOW`."""
    used = multi_hot(rows.routes, rows.num_experts).astype(bool)
    found = np.zeros(used.shape, np.uint8)
    for ahead in range(min(WINDOW, len(used) - 1), 0, -1):
        same = rows.sequence[ahead:] == rows.sequence[:-ahead]
        later = used[ahead:] & same[:, None, None]
        found[:-ahead][later] = ahead
    return found


def discounted(next_uses: Array) -> Array:
    """What rows are worth: float32 `[..., G]`, g^(next use - 1) per discount, 0 for no use."""
    table = np.zeros((WINDOW + 1, len(DISCOUNTS)), np.float32)
    table[1:] = np.asarray(DISCOUNTS)[None] ** np.arange(WINDOW)[:, None]
    return table[next_uses]


def recall(
    stream: Stretch,
    memory: Stretch,
    likeness: Likeness,
    *,
    recent: int,
    leave_out: bool = False,
) -> Iterator[tuple[slice, torch.Tensor, torch.Tensor]]:
    """What followed tokens like each token of a stream, per layer; see `average_over_alike`.

    Yields:
        Rows of the stream, float32 `[B, S, E, G]` of what followed, and `[B, S, 2]` of how sure.
    """
    future = np.concatenate([next_uses_within(memory), next_uses_within(stream)])

    def worth(stage: int) -> torch.Tensor | None:
        return None if stage < 0 else torch.from_numpy(discounted(future[:, stage])).flatten(1)

    blocks = average_over_alike(
        stream, memory, likeness, worth, recent=recent, wait=WINDOW, leave_out=leave_out
    )
    for rows, averages, sure in blocks:
        followed = torch.stack([averages[s] for s in sorted(averages)], 1)
        yield rows, followed.unflatten(2, (-1, len(DISCOUNTS))), sure[:, 1:]


class LiveRecall(LiveAlike):
    """`recall` for one token and layer at a time: the same figures from a growing memory.

    Shapes:
        `_next` uint8 `[C, S, E]`: as `next_uses_within`.
    """

    def __init__(self, memory: Stretch, likeness: Likeness, recent: int) -> None:
        super().__init__(memory, likeness, recent)
        self._next = np.zeros((self.columns, *self.used.shape[:2]), np.uint8)
        self._next[: len(memory.routes)] = next_uses_within(memory)

    def look(self, looking: Looking, layer: int, experts: Array) -> tuple[Array, Array]:
        """After layer `layer` of the token: what followed, `[E, G]`, and how sure, `[2]`."""
        self.advance(looking, layer, experts)
        alike = self.find(looking)
        worth = discounted(self._next[alike.columns, layer])
        return np.einsum("c,ceg->eg", alike.weights, worth), alike.sure

    def add_with_future(self, routes: Array, next_uses: Array, before: int) -> int:
        """As `add`, with what followed the token."""
        column = self.add(routes, before)
        if column >= 0:
            self._next[column] = next_uses
        return column
