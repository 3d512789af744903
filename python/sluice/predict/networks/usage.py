"""How each expert was used so far: what networks read of the past, one token at a time."""

from __future__ import annotations

from dataclasses import dataclass

import torch

HALF_LIVES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 1024)
"""In tokens, of the decayed counts."""
AGE, USED, WEIGHT, IN_SEQUENCE, SHARES = range(5)
"""Features by place; of shares the first, one for each half-life."""
NUM_FEATURES = SHARES + len(HALF_LIVES)
NEVER = 2000
"""An age, in tokens, from which on it makes no difference."""
_CHUNK = 32


@dataclass(slots=True)
class Usage:
    """What is known after some tokens; experts of the same layer side by side.

    Attributes:
        decayed: `[H, S, E]`, a count per half-life that fades with every token.
        age: `[S, E]` tokens since the last use, at most `NEVER`.
        in_sequence: `[S, E]` uses in the running sequence.
        tokens: Tokens of the running sequence.
    """

    decayed: torch.Tensor
    age: torch.Tensor
    in_sequence: torch.Tensor
    tokens: int = 0

    @classmethod
    def nothing(cls, num_layers: int, num_experts: int) -> Usage:
        """Before the first token."""
        blank = torch.zeros(num_layers, num_experts)
        return cls(blank.repeat(len(HALF_LIVES), 1, 1), blank + NEVER, blank.clone())

    def at(self, first: int, stop: int) -> Usage:
        """The same of a range of layers."""
        layers = slice(first, stop)
        return Usage(
            self.decayed[:, layers], self.age[layers], self.in_sequence[layers], self.tokens
        )

    def new_sequence(self) -> Usage:
        """The same with a sequence that begins now."""
        return Usage(self.decayed, self.age, torch.zeros_like(self.in_sequence), 0)


def advance(
    usage: Usage, used: torch.Tensor, weights: torch.Tensor, starts: torch.Tensor
) -> tuple[torch.Tensor, Usage]:
    """Features after each of some tokens, its own routes included, and what is known after all.

    Args:
        usage: Before the first of them.
        used: `[T, S, E]` of 0 and 1.
        weights: `[T, S, E]`, the router's weight of what was used, else 0.
        starts: bool `[T]`: a sequence begins with this token.

    Returns:
        `[T, S, E, NUM_FEATURES]`: age; used now; with which weight; how often in the sequence; the
        shares by half-life.
    """
    parts: list[torch.Tensor] = []
    for begin in range(0, len(used), _CHUNK):
        rows = slice(begin, begin + _CHUNK)
        features, usage = _advance(usage, used[rows], weights[rows], starts[rows])
        parts.append(features)
    return (parts[0] if len(parts) == 1 else torch.cat(parts)), usage


def _advance(
    usage: Usage, used: torch.Tensor, weights: torch.Tensor, starts: torch.Tensor
) -> tuple[torch.Tensor, Usage]:
    tokens, layers, experts = used.shape
    flat = used.reshape(tokens, -1)
    out = used.new_empty(tokens, layers * experts, NUM_FEATURES)
    out[:, :, USED] = flat
    out[:, :, WEIGHT] = 4 * weights.reshape(tokens, -1)

    # A use at token j has faded since: one product with a triangle for all tokens.
    since = torch.arange(tokens)[:, None] - torch.arange(tokens)[None]
    decayed = usage.decayed.clone()
    for i, half_life in enumerate(HALF_LIVES):
        fade = 2.0 ** (-1.0 / half_life)
        triangle = torch.where(since >= 0, fade ** since.clamp(min=0).float(), 0.0)
        faded = fade ** (torch.arange(tokens) + 1.0)
        counts = triangle @ flat + faded[:, None] * usage.decayed[i].reshape(1, -1)
        decayed[i] = counts[-1].view(layers, experts)
        out[:, :, SHARES + i] = (counts * (1 - fade)).sqrt_()

    clock = torch.arange(tokens, dtype=flat.dtype)[:, None]
    last = torch.where(flat > 0, clock, -1.0 - usage.age.reshape(1, -1))
    age = (clock - last.cummax(0).values).clamp_(max=NEVER)
    out[:, :, AGE] = age.log1p() * 0.25 - 0.8

    # Uses since the sequence began: all so far, less those before its first token.
    total = torch.cat([usage.in_sequence.reshape(1, -1), flat]).cumsum(0)
    begun = torch.where(starts, torch.arange(tokens), -1).cummax(0).values
    before = torch.where((begun >= 0)[:, None], total[begun.clamp(min=0)], 0.0)
    in_sequence = total[1:] - before
    length = torch.arange(tokens) + 1 - begun.clamp(min=0)
    length = torch.where(begun >= 0, length, length + usage.tokens)
    out[:, :, IN_SEQUENCE] = _share_of_sequence(in_sequence, length[:, None])

    after = Usage(
        decayed,
        age[-1].view(layers, experts).clone(),
        in_sequence[-1].view(layers, experts).clone(),
        int(length[-1]),
    )
    return out.view(tokens, layers, experts, NUM_FEATURES), after


def at_sequence_start(features: torch.Tensor) -> torch.Tensor:
    """The same features, in place, as a sequence's first token reads those of the token before."""
    features[..., IN_SEQUENCE] = _share_of_sequence(torch.zeros(()), torch.zeros(()))
    return features


def _share_of_sequence(uses: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    return ((uses + 0.3) / (tokens + 3)).sqrt()
