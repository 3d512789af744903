"""transformers' own T5, in sizes that no checkpoint has, and its decoder step by step."""

from __future__ import annotations

from typing import Any

import torch

Kept = tuple[tuple[torch.Tensor, torch.Tensor], ...]
"""Keys and values per layer, each `[B, heads, T, d_kv]`."""


def new_t5(
    *,
    vocabulary: int,
    width: int,
    inner: int,
    layers: int,
    heads: int,
    head_width: int,
    dropout: float,
) -> Any:
    """A T5Model with fresh weights, initialised as T5 is.

    Args:
        vocabulary: Rows of its one table.
        width: d_model.
        inner: d_ff.
        layers: Of the encoder, and of the decoder again.
        heads: Of each attention.
        head_width: d_kv.
        dropout: In training.
    """
    from transformers import T5Config, T5Model

    config = T5Config(
        vocab_size=vocabulary,
        d_model=width,
        d_kv=head_width,
        d_ff=inner,
        num_layers=layers,
        num_heads=heads,
        dropout_rate=dropout,
    )
    return T5Model(config)


def new_cache(own: Kept, cross: Kept) -> Any:
    """What a decoder reads and adds to: keys and values of its own rows, and of the encoder's.

    Args:
        own: Of tokens that went through; () for none.
        cross: Of the encoder's states; (): the decoder makes them.
    """
    from transformers import DynamicCache, EncoderDecoderCache

    both = DynamicCache(), DynamicCache()
    for cache, kept in zip(both, (own, cross), strict=True):
        for layer, (keys, values) in enumerate(kept):
            cache.update(keys, values, layer)
    return EncoderDecoderCache(*both)  # once both are filled: it looks whether `cross` is there


def decode(
    decoder: Any,
    tokens: torch.Tensor,
    seen: torch.Tensor,
    source: torch.Tensor,
    source_seen: torch.Tensor,
    *,
    own: Kept,
    cross: Kept,
) -> tuple[torch.Tensor, Kept, Kept]:
    """Tokens through a T5's decoder: their states `[B, T, d_model]`, `own` with them, `cross`.

    Args:
        decoder: Of `new_t5`.
        tokens: Embedded, `[B, T, d_model]`.
        seen: `[B or 1, 1, T, W + T]`: added to the scores of the W rows in `own`, then of tokens.
        source: The encoder's states `[B, M, d_model]`.
        source_seen: `[B or 1, 1, T, M]`, likewise.
        own: As in `new_cache`.
        cross: As in `new_cache`.
    """
    cache = new_cache(own, cross)
    # By position: newer releases of transformers call `past_key_values` by another name, `cache`.
    output = decoder(None, seen, source, source_seen, tokens, cache)
    return output[0], _kept(cache.self_attention_cache), _kept(cache.cross_attention_cache)


def _kept(cache: Any) -> Kept:
    return tuple((each.keys, each.values) for each in cache.layers)
