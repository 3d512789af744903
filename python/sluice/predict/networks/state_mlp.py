"""Who the next layers will use, by what enters experts: the per-layer MLPs with states."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from sluice.errors import CheckpointError
from sluice.predict.arrays import take
from sluice.predict.live import Request
from sluice.predict.networks.layer_head import States
from sluice.predict.networks.layer_mlp import LayerMlp, LayerMlpSettings
from sluice.trace import Trace

Array = NDArray[Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class StateMlpSettings(LayerMlpSettings):
    """As `LayerMlpSettings`, for wider inputs: a wider layer, less dropped, larger steps.

    What reads states takes 4 S H (hidden + E) (max_layers + 1) bytes beside the model.
    """

    hidden: int = 256
    dropout: float = 0.1
    learning_rate: float = 4e-3


class StateMlp(LayerMlp):
    """As `LayerMlp`, and it reads what entered experts.

    Of the running token those of the newest known layer; of the token before, whose state the
    layer's attention reads, those of the layer that is predicted.

    Source: ProMoE (2410.22134), MLPs per layer on states, one to three layers ahead; the token
    before's is this project's.
    """

    name = "state-mlp"
    settings_type = StateMlpSettings
    needs_hidden = True

    def _width(self, trace: Trace) -> int:
        assert trace.hidden is not None
        return int(trace.hidden.shape[2])

    def _saved_width(self, arrays: Mapping[str, Array]) -> int:
        assert self.shape is not None
        width = take(arrays, "earlier", (self.shape.num_layers, -1, self.settings.hidden)).shape[1]
        if width == 0:
            raise CheckpointError("predictor: got states without a width")
        return width

    def _states(self, trace: Trace, rows: Any, known: Array) -> States:
        assert trace.hidden is not None
        here = np.arange(trace.num_tokens)[rows]
        some = _known_part(known)
        newest = trace.hidden[here][:, known[some] - 1].astype(np.float32)
        earlier = trace.hidden[here - 1].astype(np.float32)
        earlier[np.isin(here, [sequence.start for sequence in trace.sequences])] = 0
        newest, earlier = (torch.from_numpy(each).transpose(0, 1) for each in (newest, earlier))
        return States(some, newest, earlier)

    def _states_of(self, request: Request, layers: Array, known: Array) -> States:
        assert self._head is not None
        width = self._head.width
        some, newest = slice(0, 0), torch.zeros(0, 1, width)
        if request.hidden is not None:
            some = _known_part(known)
            newest = torch.from_numpy(np.asarray(request.hidden, np.float32))
            newest = newest.expand(some.stop - some.start, 1, width)
        earlier = torch.zeros(len(layers), 1, width)
        if request.earlier is not None:
            earlier[:, 0] = torch.from_numpy(request.earlier[layers])
        return States(some, newest, earlier)


def _known_part(known: Array) -> slice:
    """Where layers are known: in a row, as only the first or those too far away lack them."""
    at = np.flatnonzero(known)
    return slice(int(at[0]), int(at[-1]) + 1) if len(at) else slice(0, 0)
