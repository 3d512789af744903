"""The dense layers of the per-layer MLPs."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional

from sluice.predict.networks.usage import NUM_FEATURES

REACH = 6
"""Layers before the one that is predicted whose routes are read."""


class States(NamedTuple):
    """What entered experts: x and z of `LayerHead`, for n layers in a row.

    Attributes:
        known: Those of the n that a layer of the running token is known for, in a row.
        newest: `[known, B, H]`, what entered the newest known layer's experts.
        earlier: `[n, B, H]`, what entered the layer's own for the token before; zeros for none.
    """

    known: slice
    newest: torch.Tensor
    earlier: torch.Tensor


class LayerHead(nn.Module):
    """Who a layer will use, from layers before it; one MLP per layer, side by side.

    For layer s, whose newest known layer is `ahead` before it (0: further than is trained for):

        u = silu(Σ_i routes[s, i] · R_s-i + past[s] · P + sure + when[ahead, s]
                 + state[ahead, s] · x + earlier[s] · z)
        y[e] = silu(expert_in · features[e] + gate[s] · u)
        logits[e] = out[s] · u + expert_out · y[e] + state_out[ahead, s] · x + earlier_out[s] · z

    R_s-i are the routes i layers before, of ones and then of router weights, nothing where they are
    not known; P is who the token before used at s; x the state that entered the newest known
    layer's experts and z that of the token before at s, each divided by its root mean square;
    features are those of `usage` as of the token before, and who alike tokens used at s (a square
    root).

    Shapes:
        `routes` `[S, REACH·2·E, hidden]`; `past` `[S, E, hidden]`; `when` `[A + 1, S, hidden]`;
        `certain` `[hidden, 2]`; `gate` `[S, hidden, units]`; `expert_in` `[units, F + 1]`; `out`
        `[S, hidden, E]`; `out_bias` `[S, E]`; `expert_out` `[1, units]`; where states are read
        `state` `[A, S, H, hidden]`, `state_out` `[A, S, H, E]`, `earlier` `[S, H, hidden]`,
        `earlier_out` `[S, H, E]`.
    """

    def __init__(
        self,
        layers: int,
        experts: int,
        width: int,
        *,
        ahead: int,
        hidden: int,
        units: int,
        dropout: float,
    ) -> None:
        super().__init__()

        def drawn(*shape: int, scale: float) -> nn.Parameter:
            return nn.Parameter(torch.randn(*shape) * scale)

        self.routes = drawn(layers, REACH * 2 * experts, hidden, scale=0.05)
        self.past = drawn(layers, experts, hidden, scale=0.05)
        self.when = nn.Parameter(torch.zeros(ahead + 1, layers, hidden))
        self.certain = nn.Linear(2, hidden, bias=False)
        self.gate = nn.Parameter(torch.zeros(layers, hidden, units))
        self.expert_in = nn.Linear(NUM_FEATURES + 1, units)
        self.expert_out = nn.Linear(units, 1)
        self.out = drawn(layers, hidden, experts, scale=0.05)
        self.out_bias = nn.Parameter(torch.full((layers, experts), -2.0))
        if width:
            self.state = drawn(ahead, layers, width, hidden, scale=width**-0.5)
            self.state_out = nn.Parameter(torch.zeros(ahead, layers, width, experts))
            self.earlier = drawn(layers, width, hidden, scale=width**-0.5)
            self.earlier_out = nn.Parameter(torch.zeros(layers, width, experts))
        self.width = width
        self.dropout = nn.Dropout(dropout)
        self.thin = nn.Dropout(dropout / 2)

    def forward(
        self,
        layers: slice,
        ahead: torch.Tensor,
        *,
        routes: torch.Tensor,
        features: torch.Tensor,
        sure: torch.Tensor,
        states: States | None,
    ) -> torch.Tensor:
        """Logits of some layers.

        Args:
            layers: Which n, in a row.
            ahead: int64 `[n]`, see above.
            routes: `[n, B, REACH·2·E]`, those next to the layer first, ones then weights.
            features: `[n, B, E, F + 1]`.
            sure: `[n, B, 2]`.
            states: Where the head reads them.

        Returns:
            `[n, B, E]`.
        """
        known = torch.bmm(self.thin(routes), self.routes[layers])
        known = known + torch.bmm(features[..., 1], self.past[layers])
        number = torch.arange(layers.start, layers.stop)
        known = known + self.when[ahead, number][:, None] + self.certain(sure)
        direct = self.out_bias[layers, None]
        if states is not None:
            earlier = _normal(states.earlier)
            known = known + torch.bmm(earlier, self.earlier[layers])
            direct = direct + torch.bmm(earlier, self.earlier_out[layers])
            if len(states.newest):
                some, newest = states.known, _normal(states.newest)
                far = (ahead[some] - 1, number[some])
                aside = (0, 0, 0, 0, some.start, len(number) - some.stop)  # zeros for the others
                known = known + functional.pad(torch.bmm(newest, self.state[far]), aside)
                direct = direct + functional.pad(torch.bmm(newest, self.state_out[far]), aside)
        known = self.dropout(functional.silu(known))
        each = self.expert_in(features) + torch.bmm(known, self.gate[layers])[:, :, None]
        logits = torch.baddbmm(direct, known, self.out[layers])
        return logits + self.expert_out(functional.silu(each))[..., 0]


def _normal(state: torch.Tensor) -> torch.Tensor:
    """States at root mean square 1; those of zeros stay."""
    return state / state.square().mean(-1, keepdim=True).add(1e-6).sqrt()
