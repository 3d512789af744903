"""Models and tokenizers for the command line and the demonstration, quietly."""

from __future__ import annotations

import sys
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from sluice.config import OffloadOptions
from sluice.hf import compat
from sluice.progress import bars_disabled


def load_causal_lm(
    folder: Path,
    *,
    dtype: torch.dtype | str = "auto",
    offload: OffloadOptions | None = None,
    device: str = "cpu",
) -> Any:
    """The causal language model of a local checkpoint, in eval mode.

    Args:
        folder: A checkpoint folder.
        dtype: What activations and dense parts compute in; "auto" is the checkpoint's own.
        offload: How its experts are held; without it the model is the stock one.
        device: Where the model runs, and offloaded experts have their slots: "cpu" or "cuda:N".

    Raises:
        ConfigError: transformers is missing or outside of the window.
        UnsupportedModelError: The experts are of no structure that sluice knows, or the device is
            none that this build computes on.
    """
    compat.version()
    from transformers import AutoModelForCausalLM

    from sluice.api import from_pretrained

    placed = {} if device == "cpu" else {"device_map": device}
    with _no_bars():
        if offload is None:
            model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **placed)
        else:
            model = from_pretrained(
                AutoModelForCausalLM, str(folder), offload=offload, dtype=dtype, **placed
            )
    return model.eval()


def load_tokenizer(folder: Path) -> Any:
    """The checkpoint's tokenizer."""
    compat.version()
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


def dense_bytes_of(model: Any) -> int:
    """Bytes that every step reads beside experts.

    All parameters but the table of embeddings, of which a token reads one row, unless the output
    layer is the same matrix.
    """
    total = sum(p.numel() * p.element_size() for p in model.parameters())
    table, head = model.get_input_embeddings(), model.get_output_embeddings()
    if table is not None and (head is None or head.weight is not table.weight):
        total -= table.weight.numel() * table.weight.element_size()
    return total


@contextmanager
def _no_bars() -> Generator[None, None, None]:
    """Keeps transformers' own bars out of files and pipes, where ours are not either."""
    from transformers.utils import logging

    if sys.stderr.isatty() and not bars_disabled():
        yield
        return
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
