"""The demonstration proves what it prints."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest


def demo(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "sluice", "demo", *arguments],
        env=os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )


@pytest.mark.timeout(600)
@pytest.mark.parametrize("budget", ["12.5%", "25%", "50%", "100%"])
def test_every_token_of_every_task_is_the_stock_models(budget: str, tmp_path: Path) -> None:
    done = demo("--json", "--device-memory", budget, "--out", str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads(done.stdout)
    assert result["tokens_equal"] is True
    assert len(result["tasks"]) == 10
    for task in result["tasks"]:
        assert task["tokens_equal"] is True, task
        assert task["text"] == task["stock_text"]
    assert 0 < result["peak_resident_bytes"] <= result["budget_bytes"]
    share = float(budget.rstrip("%")) / 100
    assert result["budget_bytes"] == int(result["expert_bytes"] * share)
    assert result["num_slots"] == int(result["num_experts"] * share)
    assert result["bytes_read"] == sum(task["bytes_read"] for task in result["tasks"])
    if budget == "100%":
        assert result["bytes_read"] <= result["expert_bytes"], "nothing is read twice"
    check_pictures(tmp_path, result)


def check_pictures(folder: Path, result: dict) -> None:
    """The figure is a picture of some size, the timeline a Chrome trace with all kinds of spans."""
    assert [Path(name).name for name in result["files"]] == ["demo.png", "timeline.json"]
    picture = (folder / "demo.png").read_bytes()
    assert picture.startswith(b"\x89PNG") and len(picture) > 30_000
    events = json.loads((folder / "timeline.json").read_text())["traceEvents"]
    spans = [event for event in events if event["ph"] == "X"]
    assert spans and all(event["dur"] >= 0 for event in spans)
    assert len({event["name"].split()[0] for event in spans}) >= 3


def test_the_text_for_people_names_every_task_and_the_memory() -> None:
    done = demo("--max-new-tokens", "2")
    assert done.returncode == 0, done.stderr
    assert done.stdout.rstrip().endswith("tokens equal: 10 of 10 tasks")
    for words in ("choice_qa", "stock tok/s", "peak expert memory 4.5 MiB of a budget of 4.5 MiB"):
        assert words in done.stdout


def test_a_differing_token_is_shown_and_ends_with_exit_code_1() -> None:
    driver = (
        "import sys, sluice.demo as demo\n"
        "generate = demo.generate_greedily\n"
        "def wrong(model, tokenizer, prompt, count, streamer=None):\n"
        "    answer = generate(model, tokenizer, prompt, count, streamer)\n"
        "    if streamer is None or prompt.task != 'intent':\n"
        "        return answer\n"
        "    return demo.Answer((5, *answer.tokens[1:]), answer.seconds)\n"
        "demo.generate_greedily = wrong\n"
        "from sluice.cli import main\n"
        "sys.exit(main(['demo', '--max-new-tokens', '2']))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", driver],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 1
    assert "tokens equal: 9 of 10 tasks" in done.stdout
    assert "intent, stock:" in done.stdout


def test_an_answer_needs_at_least_one_token() -> None:
    done = demo("--max-new-tokens", "0")
    assert done.returncode == 1 and "--max-new-tokens: got 0" in done.stderr
