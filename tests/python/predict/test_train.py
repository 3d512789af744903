"""`sluice train`: from files of traces to a folder, its card and what it printed."""

from __future__ import annotations

import contextlib
import io
import json
from pathlib import Path
from typing import Any

import pytest

from predict.small_traces import random_trace
from sluice.cli import main
from sluice.predict import evaluate, load, make, train
from sluice.trace import Split, split_by_sequence
from sluice.trace import load as load_trace
from sluice.trace import save as save_trace

LENGTHS = (12, 9, 11, 10, 8, 12, 9, 10, 11, 12)


@pytest.fixture
def files(tmp_path: Path) -> list[str]:
    return [
        str(save_trace(random_trace(seed, sequences=LENGTHS), tmp_path / f"t{seed}"))
        for seed in (1, 2)
    ]


def run(*arguments: str) -> tuple[int, str, str]:
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main(["train", *arguments])
    return code, out.getvalue(), err.getvalue()


def test_train_fits_scores_and_saves(files: list[str], tmp_path: Path) -> None:
    folder = tmp_path / "out"
    code, out, err = run("path-table", "--trace", *files, "--out", str(folder), "--json")
    assert code == 0, err
    told = json.loads(out)
    predictor, split = load(folder), Split.load(folder / "split.json")
    trace = load_trace(files[0])
    assert len(split.fit) == 8 and len(split.choose) == 2 and len(split.score) == 10
    assert set(predictor.fitting.fit) == set(split.fit)
    assert set(predictor.fitting.choose) == set(split.choose)
    card = json.loads((folder / "card.json").read_text())
    assert card["evaluation"] == told["evaluation"]
    # The figures can be had again from the folder and the split alone.
    again = train(make("path-table"), trace, split)  # type: ignore[arg-type]
    assert again.evaluation is not None
    scored = split.of(trace, "score")
    assert evaluate(again.predictor, scored).to_dict() == again.evaluation.to_dict()


def test_text_shows_recall_beside_precision(files: list[str], tmp_path: Path) -> None:
    code, out, _ = run("popularity", "--trace", files[0], "--out", str(tmp_path / "out"))
    assert code == 0
    assert "popularity: fitted on" in out and "recall" in out and "precision" in out
    assert "B_acc / precision" in out


def test_settings_seed_and_split_reach_the_predictor(files: list[str], tmp_path: Path) -> None:
    split = split_by_sequence(load_trace(files[0]), (0.5, 0.0, 0.5), seed=7)
    split.save(tmp_path / "mine.json")
    arguments = ["--split", str(tmp_path / "mine.json"), "--seed", "5", "--horizons", "2"]
    settings = ["--set", "back_off=2.5", "--set", "keys=pairs", "--set", "adapt=true"]
    code, _, err = run(
        "path-table", "--trace", files[0], "--out", str(tmp_path / "o"), *arguments, *settings
    )
    assert code == 0, err
    predictor: Any = load(tmp_path / "o")
    assert predictor.settings.back_off == 2.5 and predictor.settings.adapt is True
    assert predictor.settings.keys == "pairs" and predictor.fitting.seed == 5
    assert set(predictor.fitting.fit) == set(split.fit) and predictor.fitting.choose == ()
    card = json.loads((tmp_path / "o" / "card.json").read_text())
    assert [result["horizon"] for result in card["evaluation"]["results"]] == [2]


def test_a_task_left_out_is_scored_and_not_read(files: list[str], tmp_path: Path) -> None:
    code, out, err = run(
        "token-table", "--trace", files[0], "--out", str(tmp_path / "o"), "--leave-out", "two",
        "--json",
    )  # fmt: skip
    assert code == 0, err
    assert json.loads(out)["evaluation"]["results"][0]["depths"][0]["by_task"].keys() == {"two"}
    trace = load_trace(files[0])
    two = {sequence.content for sequence in trace if sequence.task == "two"}
    assert not two & load(tmp_path / "o").fitting.read


def test_the_list_of_predictors() -> None:
    code, out, _ = run("list")
    assert code == 0 and "path-table" in out.split()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["path-tabel", "--trace", "x", "--out", "y"], "did you mean 'path-table'"),
        (["path-table", "--out", "y"], "expected both"),
        (["path-table", "--trace", "nowhere", "--out", "y"], "nowhere"),
        (["path-table", "--trace", "FILE", "--out", "y", "--shares", "1,2"], "three numbers"),
        (["path-table", "--trace", "FILE", "--out", "y", "--shares", "0,0,1"], "none to fit on"),
        (["path-table", "--trace", "FILE", "--out", "y", "--horizons", "0"], "--horizons"),
        (["path-table", "--trace", "FILE", "--out", "y", "--set", "x"], "NAME=VALUE"),
        (["path-table", "--trace", "FILE", "--out", "y", "--model", "."], "beside next-gate"),
        (["next-gate", "--trace", "FILE", "--out", "y"], "without hidden states"),
    ],
)
def test_refusals_are_one_line(
    arguments: list[str], says: str, files: list[str], tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    code, out, err = run(*(files[0] if each == "FILE" else each for each in arguments))
    assert code == 1 and out == ""
    assert len(err.splitlines()) == 1 and says in err
    assert not (tmp_path / "y").exists()
