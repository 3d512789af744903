"""The reference model that ships with the package: its files, proven by hash, and its ten prompts.

Everything here works without transformers; `sluice.hf.auto` builds the model from the path.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

from sluice.errors import CheckpointError

_DIRECTORY = Path(__file__).parent / "models" / "reference-moe"
_SUMS = "SHA256SUMS"


@dataclass(frozen=True, slots=True)
class ReferencePrompt:
    """The first test record of one task.

    Args:
        task: One of ten, such as "intent".
        source: The data set that the record comes from.
        prompt: What is asked; empty for running text.
        response: What the data set answers, for reading beside the model's own text.
    """

    task: str
    source: str
    prompt: str
    response: str

    @property
    def text(self) -> str:
        """The model's input: the prompt between its begin and separator tokens."""
        return f"<|bos|>{self.prompt}<|sep|>"


def reference_model() -> Path:
    """The reference model's folder, after comparing each file with `SHA256SUMS`.

    Raises:
        CheckpointError: A file is missing or is not the one that was shipped.
    """
    verify_folder(_DIRECTORY)
    return _DIRECTORY


def reference_prompts() -> list[ReferencePrompt]:
    """One prompt per task, in the order of the file.

    Raises:
        CheckpointError: As `reference_model`.
    """
    records = json.loads((reference_model() / "prompts.json").read_text(encoding="utf-8"))
    return [ReferencePrompt(**record) for record in records]


def verify_folder(folder: Path) -> None:
    """Compares every file that the folder's `SHA256SUMS` names.

    Raises:
        CheckpointError: Naming the first file that is missing or differs, with both hashes.
    """
    sums = folder / _SUMS
    if not sums.is_file():
        raise CheckpointError(
            f"{folder}: got no {_SUMS}, expected the reference model; install sluice again"
        )
    for line in sums.read_text(encoding="utf-8").splitlines():
        expected, _, name = line.partition("  ")
        path = folder / name
        if not path.is_file():
            raise CheckpointError(f"{path}: got no file, expected {name}; install sluice again")
        found = sha256_of(path)
        if found != expected:
            raise CheckpointError(
                f"{path}: got SHA-256 {found}, expected {expected}; "
                "the file was changed or cut short, install sluice again"
            )


def sha256_of(path: Path) -> str:
    """The file's SHA-256 in hexadecimal digits."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
