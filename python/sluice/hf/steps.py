"""Steps of a model that runs, and who watches them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from sluice.predict.protocol import Predictor, RoutingEvent

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


class Observer(Protocol):
    """Who watches a model run. Called on the caller's thread: what it takes, the model waits."""

    def begin_step(self, step: Step) -> None:
        """A forward begins."""
        ...

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
        ...

    def end_step(self, step: Step, *, complete: bool) -> None:
        """The forward has ended; not `complete` when it raised, or ran other rows than its own."""
        ...

    def forget(self, requests: Requests) -> None:
        """What was seen of these requests is not what they turned out to be."""
        ...


class PredictorObserver:
    """Shows a `Predictor` every step and, on the CPU, each layer's routing as it happens.

    On an accelerator an event waits for its ids: one synchronisation a layer, so a predictor that
    is to keep up there runs in the core or a step behind.

    Args:
        predictor: What learns and plans.
        hidden: Whether events carry the states, which costs a copy to float32.
    """

    def __init__(self, predictor: Predictor, *, hidden: bool = False) -> None:
        self.predictor = predictor
        self._hidden = hidden
        self._rows: tuple[Requests, tuple[str, ...], NDArray[np.int32] | None] | None = None

    def begin_step(self, step: Step) -> None:
        """Hands on rows and ids."""
        ids = None
        if step.token_ids is not None:
            ids = step.token_ids.reshape(-1).cpu().numpy().astype(np.int32)
        requests = np.repeat(step.requests, step.tokens)
        tasks = tuple(task for task in step.tasks for _ in range(step.tokens))
        self._rows = (requests, tasks, ids)
        self.predictor.begin_step(step.index, requests, ids, tasks)

    def routed(
        self,
        step: Step,
        layer: int,
        hidden: torch.Tensor,
        ids: torch.Tensor,
        weights: torch.Tensor,
    ) -> None:
        """Hands on what one router chose; rows of padding are among them."""
        assert self._rows is not None
        requests, tasks, token_ids = self._rows
        if len(requests) != ids.shape[0]:
            return  # rows that cannot be told
        self.predictor.observe(
            RoutingEvent(
                step=step.index,
                layer=layer,
                experts=ids.to("cpu", torch.int16).numpy(),
                weights=weights.detach().to("cpu", torch.float32).numpy(),
                requests=requests,
                decode=not step.prompt,
                token_ids=token_ids,
                hidden=hidden.detach().to("cpu", torch.float32).numpy() if self._hidden else None,
                tasks=tasks,
            )
        )

    def end_step(self, step: Step, *, complete: bool) -> None:
        """Nothing to hand on."""

    def forget(self, requests: Requests) -> None:
        """Nothing to take back: what was routed was routed."""
