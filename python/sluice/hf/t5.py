"""transformers' own T5, in sizes that no checkpoint has."""

from __future__ import annotations

from typing import Any


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
