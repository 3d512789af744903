"""What is known beside each token of a trace, in order: as the heads of networks read it."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch

from sluice.predict.arrays import multi_hot
from sluice.predict.networks.forecast_head import CONTEXT
from sluice.predict.networks.usage import Usage, advance
from sluice.trace import Trace

Inputs = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]
"""Arguments of `ForecastHead`."""

_ROWS = 128


def routes_as_ones(experts: torch.Tensor, values: torch.Tensor, num_experts: int) -> torch.Tensor:
    """`[..., K]` values at their experts: `[..., E]`; -1 marks nothing."""
    wide = torch.zeros(*experts.shape[:-1], num_experts + 1)
    at = torch.where(experts < 0, num_experts, experts).long()
    return wide.scatter_(-1, at, values)[..., :num_experts]


def with_recalled(features: torch.Tensor, followed: torch.Tensor) -> torch.Tensor:
    """Usage and what followed similar tokens side by side, the latter as square roots."""
    return torch.cat([features, followed.float().clamp(min=0).sqrt()], -1)


def context_of(features: torch.Tensor) -> torch.Tensor:
    """`[T, S, E, F]` of some tokens as `[T, S * E * 2]`: what the token after each reads."""
    return features[..., list(CONTEXT)].flatten(1)


class History:
    """Walks over a trace once, block by block in order."""

    def __init__(self, trace: Trace) -> None:
        self._trace = trace
        self._usage = Usage.nothing(trace.num_layers, trace.num_experts)
        self._context = torch.zeros(1, trace.num_layers * trace.num_experts * len(CONTEXT))
        first = np.zeros(trace.num_tokens, np.int64)
        for sequence in trace.sequences:
            first[sequence.rows] = sequence.start
        self._position = torch.from_numpy(np.arange(trace.num_tokens) - first).float()

    def read(
        self, rows: slice, followed: torch.Tensor, sure: torch.Tensor
    ) -> Iterator[tuple[slice, Inputs]]:
        """The next rows: what was recalled for them in, what the head reads out, in small parts."""
        trace = self._trace
        for begin in range(rows.start, rows.stop, _ROWS):
            part = slice(begin, min(begin + _ROWS, rows.stop))
            inner = slice(part.start - rows.start, part.stop - rows.start)
            used = torch.from_numpy(multi_hot(trace.experts[part], trace.num_experts))
            weights = torch.zeros_like(used)
            if trace.weights is not None:
                weights = routes_as_ones(
                    torch.from_numpy(trace.experts[part]),
                    torch.from_numpy(trace.weights[part]),
                    trace.num_experts,
                )
            position = self._position[part]
            features, self._usage = advance(self._usage, used, weights, position == 0)
            after = context_of(features)
            context = torch.cat([self._context, after[:-1]])
            context[position == 0, ::2] = 0.0  # nothing of the sequence before: `CONTEXT`'s first
            self._context = after[-1:]
            both = with_recalled(features, followed[inner])
            yield part, (context, position, used, both, sure[inner].float())
