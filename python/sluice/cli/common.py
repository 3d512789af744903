"""What the verbs share: their result and their arguments."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sluice.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a verb found: `payload` under `--json`, else `text`; `code` is the exit code."""

    payload: dict[str, Any]
    text: str
    code: int = 0


def model_folder(text: str) -> Path:
    """The folder of a local checkpoint.

    Raises:
        ConfigError: There is no such folder, or it holds no config.json.
    """
    folder = Path(text).expanduser()
    if not folder.is_dir():
        raise ConfigError(
            f"model folder: got {text!r}, which is {'a file' if folder.exists() else 'not there'}, "
            "expected a local checkpoint folder with a config.json; download the checkpoint first"
        )
    if not (folder / "config.json").is_file():
        raise ConfigError(
            f"model folder: got {text!r} without a config.json, expected a checkpoint as "
            "save_pretrained writes it"
        )
    return folder


def add_host_memory(parser: argparse.ArgumentParser) -> None:
    """`--host-memory`, spelled the same for every verb."""
    parser.add_argument(
        "--host-memory",
        metavar="SIZE",
        help="beside a GPU: RAM for experts, written like --device-memory; default 80%% of the RAM "
        "that is free",
    )


def add_budget(parser: argparse.ArgumentParser, *, default: str | None, help_tail: str) -> None:
    """`--device-memory`, spelled the same for every verb."""
    parser.add_argument(
        "--device-memory",
        metavar="SIZE",
        default=default,
        help="memory for resident experts: 6GiB, 6GB, 25%% of their slots' bytes, or bytes; "
        + help_tail,
    )
