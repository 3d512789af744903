"""The dense layers of the forecaster."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional

from sluice.predict.networks.futures import DISCOUNTS as RECALLED
from sluice.predict.networks.usage import HALF_LIVES, IN_SEQUENCE, NUM_FEATURES, SHARES

CONTEXT = (IN_SEQUENCE, SHARES + HALF_LIVES.index(16))
"""Features of the token before that describe where the text is, the sequence's own first."""


class ForecastHead(nn.Module):
    """Keep-scores of every expert of a layer, from what is known when its router has answered.

    All of it is dense layers and elementwise functions, to be run for one token at a time:

        u = silu(context + Σ_j≤s prefix[j, R_j] + Σ own[s, R_s] + sure + bias[s])      [hidden]
        x[e] = silu(expert_in · features[e] + gate[s] · u)                             [units]
        logits[e] = out[s] · u + expert_out · x[e]                                     [G]

    `context` = `place · (C, position)` is of the token before and made once a token; C are the
    features `CONTEXT` of all experts of all layers, layer-major, then expert, then feature.

    Shapes:
        `prefix`, `own` `[S, E, hidden]`; `bias` `[S, hidden]`; `place` `[hidden, S·E·2 + 1]`;
        `certain` `[hidden, 2]`; `gate` `[S, hidden, units]`; `expert_in` `[units, F + R]`;
        `out` `[S, hidden, E·G]`, expert-major; `out_bias` `[S, E·G]`; `expert_out` `[G, units]`.
    """

    def __init__(
        self, layers: int, experts: int, heads: int, *, hidden: int, units: int, dropout: float
    ) -> None:
        super().__init__()
        self.experts, self.heads = experts, heads
        self.place = nn.Linear(layers * experts * len(CONTEXT) + 1, hidden)
        self.certain = nn.Linear(2, hidden, bias=False)
        self.prefix = nn.Parameter(torch.randn(layers, experts, hidden) * 0.05)
        self.own = nn.Parameter(torch.randn(layers, experts, hidden) * 0.05)
        self.bias = nn.Parameter(torch.zeros(layers, hidden))
        self.gate = nn.Parameter(torch.zeros(layers, hidden, units))
        self.expert_in = nn.Linear(NUM_FEATURES + len(RECALLED), units)
        self.expert_out = nn.Linear(units, heads)
        self.out = nn.Parameter(torch.randn(layers, hidden, experts * heads) * 0.02)
        self.out_bias = nn.Parameter(torch.full((layers, experts * heads), -2.0))
        self.dropout = nn.Dropout(dropout)
        self.thin = nn.Dropout(dropout / 2)

    def forward(
        self,
        context: torch.Tensor,
        position: torch.Tensor,
        used: torch.Tensor,
        features: torch.Tensor,
        sure: torch.Tensor,
    ) -> torch.Tensor:
        """Logits of some consecutive layers.

        Args:
            context: `[B, S·E·2]`.
            position: `[B]`, tokens of the sequence before this one.
            used: `[B, first + n, E]` of 0 and 1: routes of the token up to the last of the layers.
            features: `[B, n, E, F + R]`: usage, then what followed similar tokens (square roots).
            sure: `[B, n, 2]`.

        Returns:
            `[B, n, E, G]`.
        """
        count, stop = used.shape[:2]
        layers = slice(stop - features.shape[1], stop)
        where = self.place(torch.cat([self.thin(context), position[:, None].log1p() / 5], 1))
        routes = used.transpose(0, 1)
        known = torch.bmm(self.thin(routes), self.prefix[:stop]).cumsum(0)[layers]
        known = known + torch.bmm(routes[layers], self.own[layers])
        known = known + where + self.bias[layers, None] + self.certain(sure.transpose(0, 1))
        known = self.dropout(functional.silu(known))
        logits = torch.baddbmm(self.out_bias[layers, None], known, self.out[layers])
        logits = logits.view(-1, count, self.experts, self.heads).transpose(0, 1)
        gate = torch.bmm(known, self.gate[layers]).transpose(0, 1)
        return logits + self.expert_out(
            functional.silu(self.expert_in(features) + gate[:, :, None])
        )

    def core_tables(self, outputs: tuple[int, int]) -> dict[str, Any]:
        """Its parts as `csrc/predict/scorers.h` wants them, with two of the outputs."""
        layers, hidden = self.bias.shape
        chosen = list(outputs)
        out = self.out.view(layers, hidden, self.experts, self.heads)[..., chosen]
        place = self.place.weight[:, :-1].view(hidden, layers, self.experts, len(CONTEXT))
        parts = {
            "prefix": self.prefix,
            "own": self.own,
            "bias": self.bias,
            "place": place.permute(1, 3, 2, 0),
            "position": self.place.weight[:, -1],
            "place_bias": self.place.bias,
            "certain": self.certain.weight.T,
            "gate": self.gate,
            "expert_in": self.expert_in.weight,
            "expert_in_bias": self.expert_in.bias,
            "out": out.permute(0, 3, 1, 2),
            "out_bias": self.out_bias.view(layers, self.experts, -1)[..., chosen].transpose(1, 2),
            "expert_out": self.expert_out.weight[chosen],
            "expert_out_bias": self.expert_out.bias[chosen],
        }
        arrays = {name: each.detach().contiguous().numpy() for name, each in parts.items()}
        return {**arrays, "hidden": hidden, "units": self.gate.shape[2]}
