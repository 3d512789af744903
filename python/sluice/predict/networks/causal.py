"""A small causal transformer over tokens, whole sequences at once or one token at a time."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional

_BASE = 10_000.0


@dataclass(frozen=True, slots=True)
class Past:
    """What a transformer keeps of tokens that went through it.

    Attributes:
        keys: Per layer `[B, heads, W, d / heads]`, already rotated; of the last W tokens.
        values: Likewise.
        tokens: How many went through in all.
    """

    keys: tuple[torch.Tensor, ...] = ()
    values: tuple[torch.Tensor, ...] = ()
    tokens: int = 0


class Block(nn.Module):
    """Pre-norm attention with rotary positions, then a gated feed-forward layer."""

    def __init__(self, width: int, heads: int, inner: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.attention_norm = nn.RMSNorm(width, eps=1e-6)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.project = nn.Linear(width, width, bias=False)
        self.inner_norm = nn.RMSNorm(width, eps=1e-6)
        self.widen = nn.Linear(width, 2 * inner, bias=False)
        self.narrow = nn.Linear(inner, width, bias=False)
        self.dropout = nn.Dropout(dropout)

    def forward(
        self, x: torch.Tensor, key: torch.Tensor | None, value: torch.Tensor | None, mask: Mask
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """`x` `[B, T, width]` and the past keys and values; both again with these tokens' own."""
        count, tokens, width = x.shape
        q, k, v = self.qkv(self.attention_norm(x)).view(count, tokens, 3, self.heads, -1).unbind(2)
        q, k, v = (each.transpose(1, 2) for each in (q, k, v))
        q, k = mask.rotate(q), mask.rotate(k)
        if key is not None and value is not None:
            k, v = torch.cat([key, k], 2), torch.cat([value, v], 2)
        seen = functional.scaled_dot_product_attention(q, k, v, attn_mask=mask.allowed)
        x = x + self.dropout(self.project(seen.transpose(1, 2).reshape(count, tokens, width)))
        gate, up = self.widen(self.inner_norm(x)).chunk(2, -1)
        return x + self.dropout(self.narrow(functional.silu(gate) * up)), k, v


class Mask:
    """Who sees whom, and the rotations by position, for tokens that follow `past` others.

    Args:
        tokens: New ones.
        past: Those that went through before.
        kept: Of which keys are there.
        window: How many tokens one sees, itself included.
        head_width: Of queries and keys, even.
    """

    def __init__(self, tokens: int, past: int, kept: int, window: int, head_width: int) -> None:
        place = torch.arange(past, past + tokens)
        source = torch.arange(past - kept, past + tokens)
        distance = place[:, None] - source[None]
        self.allowed = (distance >= 0) & (distance < window)
        rates = _BASE ** (-torch.arange(0, head_width, 2) / head_width)
        angles = place[:, None] * rates[None]
        self._cos, self._sin = angles.cos(), angles.sin()

    def rotate(self, x: torch.Tensor) -> torch.Tensor:
        """Pairs of channels of `[B, heads, T, d]`, turned by their token's position."""
        even, odd = x[..., ::2], x[..., 1::2]
        turned = (even * self._cos - odd * self._sin, even * self._sin + odd * self._cos)
        return torch.stack(turned, -1).flatten(-2)


class Causal(nn.Module):
    """Blocks in a row; a token sees itself and `window - 1` before it in each."""

    def __init__(self, width: int, layers: int, heads: int, *, window: int, dropout: float) -> None:
        super().__init__()
        self.window, self.head_width = window, width // heads
        self.blocks = nn.ModuleList(Block(width, heads, 4 * width, dropout) for _ in range(layers))
        self.norm = nn.RMSNorm(width, eps=1e-6)

    def forward(self, x: torch.Tensor, past: Past) -> tuple[torch.Tensor, Past]:
        """`[B, T, width]` after `past`: the output, and the past with these tokens in it."""
        kept = past.keys[0].shape[2] if past.keys else 0
        mask = Mask(x.shape[1], past.tokens, kept, self.window, self.head_width)
        keys: list[torch.Tensor] = []
        values: list[torch.Tensor] = []
        for i, block in enumerate(self.blocks):
            before = (past.keys[i], past.values[i]) if past.keys else (None, None)
            x, key, value = block(x, *before, mask)
            keys.append(key[:, :, -(self.window - 1) :] if self.window > 1 else key[:, :, :0])
            values.append(value[:, :, -(self.window - 1) :] if self.window > 1 else value[:, :, :0])
        return self.norm(x), Past(tuple(keys), tuple(values), past.tokens + x.shape[1])
