"""`sluice trace` as a user calls it."""

from __future__ import annotations

import contextlib
import gzip
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_imports import E, K, L, esft, routes, sglang, vllm

from sluice import trace
from sluice.cli import main
from sluice.trace import Trace, TraceSequence
from sluice.trace.describe import describe


def run(*arguments: str) -> tuple[int, str, str]:
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main(["trace", *arguments])
    return code, out.getvalue(), err.getvalue()


def answers(tmp_path: Path, kind: str) -> tuple[Path, list[str]]:
    if kind == "esft":
        return esft(tmp_path), []
    response = vllm(routes(9), 6) if kind == "vllm" else sglang(routes(9), 6)
    (tmp_path / "answers.jsonl").write_text(json.dumps(response) + "\n")
    sizes = [f"--num-experts={E}", f"--num-layers={L}", f"--top-k={K}", "--task=chat"]
    return tmp_path / "answers.jsonl", sizes


@pytest.mark.parametrize("kind", ["esft", "vllm", "sglang"])
def test_what_others_recorded_is_imported_and_shown(tmp_path: Path, kind: str) -> None:
    path, sizes = answers(tmp_path, kind)
    code, out, err = run("import", kind, str(path), f"--out={tmp_path / 'x'}", *sizes, "--json")
    assert code == 0, err
    assert json.loads(out)["tokens"] == 9
    file = tmp_path / "x.trace.safetensors"
    assert (trace.load(file).experts == routes(9)).all()
    code, out, _ = run("show", str(file))
    assert code == 0 and "4 MoE layers, top 2 of 16 experts" in out
    code, out, _ = run("show", str(file), "--json")
    assert json.loads(out)["tokens"] == 9


def test_what_an_import_needs_is_asked_for_by_name(tmp_path: Path) -> None:
    path, _ = answers(tmp_path, "sglang")
    code, _, err = run("import", "sglang", str(path), "--out=x", "--num-experts=16")
    assert code == 1 and "--num-layers: got none, expected it with sglang" in err


def test_the_figures_of_a_trace_that_can_be_counted_by_hand() -> None:
    # Two layers of four experts, top 2: the first always the same, the second all in turn.
    experts = np.array(
        [[[0, 1], [0, 1]], [[0, 1], [2, 3]], [[1, 0], [1, 2]], [[0, -1], [3, 0]]], dtype=np.int16
    )
    sequences = (TraceSequence(0, 3, 1, "a", "", "x"), TraceSequence(3, 1, -1, "b", "", "y"))
    summary = describe(Trace(experts=experts, num_experts=4, sequences=sequences))
    assert [(t.task, t.prompt, t.decode, t.unknown) for t in summary.tasks] == [
        ("a", 1, 2, 0),
        ("b", 0, 0, 1),
    ]
    first, second = summary.by_layer
    assert (first.used, second.used) == (2, 4)
    assert first.top_quarter == 4 / 7 and second.top_quarter == 0.25
    assert second.entropy == pytest.approx(1) and first.entropy == pytest.approx(0.4926, abs=1e-4)
    # Neighbours are tokens 0-1 and 1-2; token 3 begins another sequence.
    assert first.overlap == 1.0 and second.overlap == 1 / 4
    rows = [line.split() for line in summary.text().splitlines()]
    assert ["a", "1", "1", "2", "0"] in rows and ["1", "4", "1.000", "25.0%", "25.0%"] in rows


def prompts(path: Path, *lines: Any) -> str:
    raw = "".join(json.dumps(line) + "\n" for line in lines).encode()
    path.write_bytes(gzip.compress(raw) if path.suffix == ".gz" else raw)
    return str(path)


def test_the_reference_model_is_recorded_from_prompts_of_a_file(tmp_path: Path) -> None:
    file = prompts(
        tmp_path / "p.jsonl.gz", {"prompt": "How are you?"}, {"prompt": "Two and two", "task": "m"}
    )
    out = tmp_path / "ref"
    code, text, err = run(
        *("record", "--reference", "--prompts", file, "--out", str(out), "--max-new-tokens=4"),
        *("--task=chat", "--token-ids", "--device=cpu", "--temperature=0.8", "--json"),
    )
    assert code == 0, err
    told = json.loads(text)
    found = trace.load(told["trace"])
    assert told["tokens"] == found.num_tokens and told["truncated_forwards"] == 0
    assert found.tasks == ("chat", "m") and found.experts.shape[1:] == (8, 4)
    assert found.token_ids is not None and found.token_ids[0] == 1  # <|bos|>
    assert all(0 <= s.length - s.prompt_tokens <= 3 for s in found)
    assert found.model.startswith("MixtralForCausalLM 8x32 ")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "got none or both of MODEL_DIR and --reference"),
        (["folder", "--reference"], "got none or both"),
        (["--reference", "--max-new-tokens=0"], "got --max-new-tokens 0"),
        (["--reference", "--out=no/such/x"], "whose folder is not there"),
        (["--reference", "--prompts=absent"], "got no readable prompts"),
        (["--reference", "--prompts=empty.txt"], "got no prompts"),
        (["--reference", "--prompts=bad.jsonl"], "bad.jsonl:2: got no"),
        (["--reference", "--prompts=number.jsonl"], "number.jsonl:1: got no"),
        (["no/such"], "model folder: got 'no/such'"),
    ],
)
def test_what_cannot_be_recorded_is_refused_before_a_model_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("ok.txt").write_text("a prompt\n")
    Path("empty.txt").write_text("\n")
    prompts(Path("bad.jsonl"), {"prompt": "x"}, {"text": "x"})
    prompts(Path("number.jsonl"), {"prompt": 3})
    code, _, err = run("record", "--prompts=ok.txt", "--out=x", *arguments)
    assert code == 1 and message in err
