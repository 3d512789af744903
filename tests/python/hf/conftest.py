"""Tiny models run on one thread, offline, and write to a cache of their own."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_OFFLINE", "1")

from . import tiny


@pytest.fixture(scope="session", autouse=True)
def quiet_transformers() -> None:
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


@pytest.fixture(autouse=True)
def one_thread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    before, state = torch.get_num_threads(), torch.random.get_rng_state()
    torch.set_num_threads(1)
    monkeypatch.setenv("SLUICE_CACHE", str(tmp_path / "sluice-cache"))
    yield
    torch.set_num_threads(before)
    torch.random.set_rng_state(state)


@pytest.fixture(scope="session")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`saved("mixtral")`: that family's folder, written once; leave it as it is."""
    folders: dict[Any, Path] = {}

    def get(
        family: str = "mixtral", *, per_expert: bool = True, dtype: Any = torch.float32
    ) -> Path:
        key = (family, per_expert, dtype)
        if key not in folders:
            folder = tmp_path_factory.mktemp(f"{family}-{per_expert}")
            folders[key] = tiny.save(tiny.build(family, dtype), folder, per_expert=per_expert)
        return folders[key]

    return get
