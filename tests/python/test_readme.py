"""The README's code runs as it stands."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from sluice.reference import reference_model

README = Path(__file__).parents[2] / "README.md"
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```", re.MULTILINE | re.DOTALL)


def blocks(language: str) -> list[str]:
    return [code for name, code in BLOCK.findall(README.read_text("utf-8")) if name == language]


def commands() -> list[str]:
    lines = [line for block in blocks("bash") for line in block.splitlines()]
    return [line for line in lines if line.startswith("sluice ")]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Where the README's made-up paths exist."""
    shutil.copytree(reference_model(), tmp_path / "path" / "to" / "checkpoint")
    shutil.copy(reference_model() / "config.json", tmp_path / "path" / "to" / "config.json")
    return tmp_path


def run(command: list[str], folder: Path) -> None:
    environment = os.environ | {
        "SLUICE_CACHE": str(folder / "cache"),
        "SLUICE_BENCH_DIR": str(folder / "bench"),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_readme_has_code_to_run() -> None:
    assert len(blocks("python")) >= 2 and len(commands()) >= 4


@pytest.mark.parametrize("index", range(len(blocks("python"))))
def test_the_python_block_runs(index: int, folder: Path) -> None:
    run([sys.executable, "-c", blocks("python")[index]], folder)


@pytest.mark.parametrize("command", commands())
def test_the_command_runs(command: str, folder: Path) -> None:
    words = shlex.split(command, comments=True)
    run([sys.executable, "-m", *words], folder)
