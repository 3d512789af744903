"""Steps of a model that runs, and who watches them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    import torch

Requests = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Step:
    """One forward of the model.

    Args:
        index: Counts forwards since the first observer came.
        requests: Which request each row belongs to, `[B]`; a number is never given twice.
        tokens: T, how many tokens of each row run.
        begins: Whether the requests begin with this forward.
        prompt: Whether these tokens were given; False: one token a row, written by the model or by
            whoever calls it.
        traceable: Whether rows can be told and were seen from their beginning.
        generated: Whether `generate` runs it.
        token_ids: int64 `[B, T]`, where the model was given ids.
        real: bool `[B, T]`, False where a token is padding; None: all are real.
        ends: Ids that end a row in a batch of `generate`: what it runs from there on is filling.
        tasks: What the user calls each row's kind of work, `[B]`.
    """

    index: int
    requests: Requests
    tokens: int
    begins: bool
    prompt: bool
    traceable: bool
    generated: bool
    token_ids: torch.Tensor | None
    real: torch.Tensor | None
    ends: frozenset[int]
    tasks: tuple[str, ...]


class Observer:
    """Who watches a model run; it overrides what it wants to know.

    Called on the caller's thread: what it takes, the model waits.

    Attributes:
        sees_layers: False: it is not told of layers, which then cost nothing.
    """

    sees_layers: ClassVar[bool] = True

    def begin_step(self, step: Step) -> None:
        """A forward begins."""

    def routed(
        self,
        step: Step,
        layer: int,
        hidden: torch.Tensor,
        ids: torch.Tensor,
        weights: torch.Tensor,
    ) -> None:
        """A layer has run its experts.

        Shapes: hidden `[B T, H]`, ids int64 and weights `[B T, K]`, where the model is. They are
        the model's own: read them, or clone.
        """

    def end_step(self, step: Step, *, complete: bool) -> None:
        """The forward has ended; not `complete` when it raised, or ran other rows than its own."""

    def forget(self, requests: Requests) -> None:
        """What was seen of these requests is not what they turned out to be."""
