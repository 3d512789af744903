"""Checkpoint folders and whole tensors of their shards."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

import torch

from sluice import _core
from sluice.errors import CheckpointError
from sluice.hf.checkpoint.recipes import Source
from sluice.tensors import TORCH_DTYPES

_DTYPES = {"F64": torch.float64, **TORCH_DTYPES}


def shard_files(folder: str | os.PathLike[str]) -> list[str]:
    """The safetensors shards of a checkpoint folder, as transformers would choose them.

    Raises:
        CheckpointError: No weights, `.bin` only, or a shard that the index names is missing.
    """
    root = Path(folder)
    index, single = root / "model.safetensors.index.json", root / "model.safetensors"
    if single.exists():
        return [str(single)]
    if index.exists():
        names = sorted(set(_weight_map(index)))
        for name in names:
            if not (root / name).exists():
                raise CheckpointError(
                    f"{root / name}: got no such file, expected the shard that {index.name} names; "
                    "download it again"
                )
        return [str(root / name) for name in names]
    if any(root.glob("*.bin")):
        raise CheckpointError(
            f"{root}: got .bin weights only, expected safetensors; convert them once: "
            "model.save_pretrained(folder)"
        )
    raise CheckpointError(
        f"{root}: got no model.safetensors and no {index.name}, expected a checkpoint folder"
    )


def _weight_map(index: Path) -> Iterator[str]:
    try:
        yield from json.loads(index.read_text())["weight_map"].values()
    except (ValueError, KeyError, AttributeError) as error:
        raise CheckpointError(
            f"{index}: got no weight_map in it ({error}), expected an index; download it again"
        ) from error


def load_source(source: Source, identity: str) -> torch.Tensor:
    """One tensor of a shard, read whole; CheckpointError when the shard was replaced meanwhile."""
    memory = bytearray(source.nbytes)
    with open(source.file, "rb", buffering=0) as file:
        if _core.file_identity(file.fileno(), source.file) != identity:
            raise CheckpointError(
                f"{source.file}: got another file than the one whose header was read; it was "
                "replaced meanwhile: load again"
            )
        file.seek(source.offset)
        view = memoryview(memory)
        while view.nbytes:
            count = file.readinto(view)
            if not count:
                raise CheckpointError(
                    f"{source.file}: got the end of the file inside {source.key}, expected "
                    f"{view.nbytes} more bytes; download the shard again"
                )
            view = view[count:]
    return torch.frombuffer(memory, dtype=_DTYPES[source.dtype]).view(source.shape)
