"""`sluice simulate` as a user types it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from sluice.cli import main
from sluice.trace import Trace, TraceSequence, content_hash, save


@pytest.fixture
def trace_file(tmp_path: Path) -> Path:
    rng = np.random.default_rng(5)
    experts = np.stack(
        [[rng.choice(8, 2, replace=False) for _ in range(3)] for _ in range(60)]
    ).astype(np.int16)
    sequences = tuple(
        TraceSequence(start, 20, task=task, content=content_hash(None, experts[start : start + 20]))
        for start, task in ((0, "a"), (20, "b"), (40, "a"))
    )
    path = tmp_path / "small.trace.safetensors"
    save(Trace(experts=experts, num_experts=8, sequences=sequences), path)
    return path


def test_a_grid_for_people_and_for_programs(
    trace_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["simulate", str(trace_file), "--slots", "25%,4", "--policy", "lfru,lru"]
    assert main(arguments) == 0
    text = capsys.readouterr().out
    assert "60 tokens, 3 layers, 8 experts" in text
    assert "2 slots" in text and "4 slots" in text
    assert [line.split()[0] for line in text.splitlines()[4:]] == ["lfru", "lru", "belady"]
    assert main([*arguments, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["slots"] == [2, 4]
    assert set(found["contenders"]) == {"lfru", "lru", "belady"}
    assert found["contenders"]["belady"][0]["gap_closed"] == 1.0
    assert found["contenders"]["lru"][0]["gap_closed"] == 0.0


def test_a_figure_is_drawn(trace_file: Path, tmp_path: Path) -> None:
    figure = tmp_path / "grid.png"
    assert main(["simulate", str(trace_file), "--figure", str(figure)]) == 0
    assert figure.read_bytes().startswith(b"\x89PNG")


def test_headroom_is_one_page(trace_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["simulate", str(trace_file), "--headroom", "--device-memory", "50%"]
    arguments += ["--expert-bytes", "1MiB", "--bandwidth", "1GB/s", "--dense-ms", "0.5"]
    assert main(arguments) == 0
    text = capsys.readouterr().out
    assert text.startswith("12 of 24 experts in memory (50.0 %), one takes 1.0 MiB; link 1 GB/s")
    assert "Belady's victims + a token's routes" in text
    assert len(text.splitlines()) < 20
    assert main([*arguments, "--json"]) == 0
    arms = json.loads(capsys.readouterr().out)["arms"]
    speed = {arm["name"]: arm["tokens_per_second"] for arm in arms}
    assert speed["Belady's victims + a token's routes"] > speed["decayed-lfu, on demand"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--slots", "many"], "slots: got 'many', expected a number or a share"),
        (["--stream", "shuffled"], "stream: got 'shuffled', expected one of stored, mix"),
        (["--phase", "decode"], "does not say where its prompt ends"),
        (["--policy", "lfru,lfru"], "expected each name once"),
        (["--headroom"], "got no --expert-bytes or no --device-memory"),
    ],
)
def test_what_cannot_be_is_said_in_a_line(
    trace_file: Path,
    arguments: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["simulate", str(trace_file), *arguments]) == 1
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_a_static_set_is_not_fitted_on_what_it_is_scored_on(
    trace_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["simulate", str(trace_file), "--policy", "static", "--fit", str(trace_file)]
    assert main(arguments) == 1
    assert "sequence" in capsys.readouterr().err
