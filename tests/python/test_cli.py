"""The command as a user meets it: real processes, exit codes and the words on stderr."""

import contextlib
import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from sluice import doctor
from sluice.cli import main
from sluice.cli.bench import find_harness
from sluice.errors import ConfigError
from sluice.progress import Progress
from sluice.reference import reference_model
from sluice.text import format_bytes

VERBS = ("doctor", "demo", "generate", "pack", "plan", "trace", "bench", "train")
REFERENCE = str(reference_model())


def sluice(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "sluice", *arguments],
        env=os.environ | {"OMP_NUM_THREADS": "1"} | environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=300,
    )


def inside(*arguments: str) -> subprocess.CompletedProcess[str]:
    """The same in this process, for repetitions: a process of its own imports torch each time."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main(arguments)
    return subprocess.CompletedProcess(arguments, code, out.getvalue(), err.getvalue())


def error_of(done: subprocess.CompletedProcess[str]) -> str:
    """The one line of an error that sluice raised on purpose."""
    assert done.returncode == 1, done.stdout + done.stderr
    lines = [line for line in done.stderr.splitlines() if line.startswith("sluice: ")]
    assert len(lines) == 1, done.stderr
    assert "Traceback" not in done.stderr
    return lines[0]


def without_transformers(folder: Path) -> dict[str, str]:
    """An environment in which transformers cannot be imported."""
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(
        "import sys\n"
        "class Blocker:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.partition('.')[0] == 'transformers':\n"
        "            raise ModuleNotFoundError(f'No module named {name!r}', name=name)\n"
        "sys.meta_path.insert(0, Blocker())\n"
    )
    return {"PYTHONPATH": str(folder)}


def dense_checkpoint(folder: Path) -> Path:
    """A model without experts."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def test_the_command_and_each_verb_explain_themselves() -> None:
    top = sluice("--help")
    assert top.returncode == 0 and all(verb in top.stdout for verb in VERBS)
    for verb in VERBS:
        done = sluice(verb, "--help")
        assert done.returncode == 0 and "--json" in done.stdout, verb


@pytest.mark.parametrize(
    "arguments",
    [(), ("fly",), ("generate", REFERENCE), ("plan",), ("demo", "--speed", "9"), ("pack",)],
    ids=" ".join,
)
def test_a_wrong_command_line_exits_with_2_and_shows_the_usage(arguments: tuple[str, ...]) -> None:
    done = sluice(*arguments)
    assert done.returncode == 2
    assert done.stderr.startswith("usage: sluice")


@pytest.mark.parametrize(
    "arguments",
    [
        ("plan", "no/such/folder"),
        ("pack", "no/such/folder"),
        ("generate", "no/such/folder", "--prompt", "x", "--device-memory", "25%"),
        ("doctor", "no/such/pack"),
    ],
    ids=lambda arguments: arguments[0],
)
def test_a_wrong_path_is_named(arguments: tuple[str, ...]) -> None:
    assert "no/such" in error_of(sluice(*arguments))


@pytest.mark.parametrize("size", ["5 parsecs", "-1", "0%", "101%", ""])
def test_a_size_that_is_none_is_refused(size: str) -> None:
    line = error_of(inside("plan", REFERENCE, f"--device-memory={size}"))
    assert "ConfigError" in line


def test_a_budget_that_is_too_small_names_those_that_work() -> None:
    for arguments in (
        ("plan", REFERENCE),
        ("generate", REFERENCE, "--prompt", "x"),
        ("demo",),
    ):
        line = error_of(inside(*arguments, "--device-memory", "1KiB"))
        assert "CapacityError" in line and "73728" in line, line


def test_generating_without_a_budget_says_what_budgets_buy() -> None:
    done = inside("generate", REFERENCE, "--prompt", "x")
    line = error_of(done)
    assert "--device-memory" in line and "sluice plan" in line


def test_a_model_without_experts_is_refused_by_class(tmp_path: Path) -> None:
    folder = str(dense_checkpoint(tmp_path / "llama"))
    for arguments in (
        ("plan", folder),
        ("pack", folder),
        ("generate", folder, "--prompt", "x", "--device-memory", "25%"),
    ):
        line = error_of(inside(*arguments))
        assert "UnsupportedModelError" in line and "LlamaForCausalLM" in line, line


def test_without_transformers_each_verb_that_needs_it_says_what_to_install(tmp_path: Path) -> None:
    environment = without_transformers(tmp_path / "blocked")
    for arguments in (
        ("demo",),
        ("plan", REFERENCE),
        ("pack", REFERENCE),
        ("generate", REFERENCE, "--prompt", "x", "--device-memory", "25%"),
    ):
        line = error_of(sluice(*arguments, **environment))
        assert "pip install 'sluice[hf]'" in line, line


def test_without_transformers_the_package_imports_and_doctor_runs(tmp_path: Path) -> None:
    environment = without_transformers(tmp_path / "blocked")
    done = sluice("doctor", "--json", SLUICE_CACHE=str(tmp_path / "cache"), **environment)
    assert done.returncode == 0, done.stderr


def test_a_damaged_reference_model_is_refused_by_hash(tmp_path: Path) -> None:
    folder = tmp_path / "reference-moe"
    shutil.copytree(REFERENCE, folder)
    (folder / "config.json").write_text("{}")
    driver = (
        "import sys, pathlib, sluice.reference as reference\n"
        f"reference._DIRECTORY = pathlib.Path({str(folder)!r})\n"
        "from sluice.cli import main\n"
        "sys.exit(main(['demo']))\n"
    )
    done = subprocess.run([sys.executable, "-c", driver], capture_output=True, text=True)
    line = error_of(done)
    assert "CheckpointError" in line and "config.json" in line and "expected 99b0ba66" in line


def test_an_error_has_its_traceback_only_when_the_log_asks_for_it() -> None:
    assert "Traceback" not in sluice("plan", "no/such").stderr
    assert "Traceback" in sluice("plan", "no/such", SLUICE_LOG="debug").stderr


def test_under_json_an_error_is_an_object_too() -> None:
    done = sluice("plan", "no/such", "--json")
    assert error_of(done)
    assert json.loads(done.stdout)["error"]["type"] == "ConfigError"


def test_generate_prints_the_text_and_its_cost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLUICE_CACHE", str(tmp_path))
    trace = tmp_path / "trace.json"
    prompt = "<|bos|>What does the user want? i need this song on my meditation playlist<|sep|>"
    common = ("generate", REFERENCE, "--prompt", prompt, "--device-memory", "25%")
    done = sluice(*common, "--max-new-tokens", "8", "--timeline", str(trace))
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("update playlist\n")
    assert "peak 4.5 MiB of 4.5 MiB" in done.stdout
    assert "achieved" not in done.stdout, "no limit without measured constants"
    assert json.loads(trace.read_text())["traceEvents"]
    doctor.store_constants(tmp_path, doctor.Constants(1e9, {"4x1MiB": 1e6}, 1.0))
    found = json.loads(inside(*common, "--max-new-tokens", "8", "--json").stdout)
    assert found["text"] == "update playlist"
    stats, decode = found["stats"], found["decode"]
    assert stats["requests"] == stats["hits"] + stats["late"] + stats["misses"] > 0
    assert found["prompt"]["bytes_read"] + decode["bytes_read"] == stats["bytes_read"]
    assert decode["disk_s"] == pytest.approx(decode["bytes_read"] / 1e6)
    assert decode["experts_s"] == pytest.approx((found["new_tokens"] - 1) * 32 * 73728 / 1e9)
    assert decode["bound"] == "disk"


def test_an_interrupted_generation_ends_with_130_and_one_line() -> None:
    driver = (
        "import sys, sluice.cli.generate as generate\n"
        "put = generate._Watch.put\n"
        "def interrupt(self, value):\n"
        "    put(self, value)\n"
        "    if self._tokens == 3:\n"
        "        raise KeyboardInterrupt\n"
        "generate._Watch.put = interrupt\n"
        "from sluice.cli import main\n"
        "sys.exit(main(sys.argv[1:]))\n"
    )
    words = ["generate", REFERENCE, "--prompt", "<|bos|><|sep|>", "--device-memory", "25%"]
    done = subprocess.run(
        [sys.executable, "-c", driver, *words], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 130
    assert done.stdout == "" and done.stderr == "sluice: interrupted\n"


def test_sampling_is_repeated_by_its_seed() -> None:
    common = ("generate", REFERENCE, "--prompt", "<|bos|><|sep|>", "--device-memory", "50%")
    common = (*common, "--temperature", "1.0", "--max-new-tokens", "12", "--json")
    texts = [json.loads(inside(*common, "--seed", seed).stdout)["text"] for seed in ("1", "1", "2")]
    assert texts[0] == texts[1] != texts[2]


def test_a_pack_is_made_found_verified_and_refused_when_a_byte_changes(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(REFERENCE, folder)
    made = sluice("pack", str(folder), "--verify", "--json")
    assert made.returncode == 0, made.stderr
    pack = json.loads(made.stdout)
    assert pack["experts"] == 256 and pack["verified"]
    assert pack["bytes"] == Path(pack["pack"]).stat().st_size > 256 * 73728
    good = inside("doctor", pack["pack"])
    assert good.returncode == 0 and "every checksum agrees" in good.stdout
    with open(pack["pack"], "r+b") as file:
        file.seek(pack["bytes"] // 2)
        byte = file.read(1)
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte[0] ^ 1]))
    assert "CheckpointError" in error_of(sluice("doctor", pack["pack"]))


def test_a_pack_goes_where_it_is_told_and_nothing_half_made_stays(tmp_path: Path) -> None:
    target = tmp_path / "elsewhere" / "experts.sluice.safetensors"
    target.parent.mkdir()
    done = inside("pack", REFERENCE, "-o", str(target))
    assert done.returncode == 0, done.stderr
    assert [path.name for path in target.parent.iterdir()] == [target.name]


def test_bench_finds_the_harness_of_a_checkout_and_says_so_when_there_is_none(
    tmp_path: Path,
) -> None:
    root = Path(__file__).parents[2]
    assert find_harness(root / "tests") == root / "benchmarks" / "run.py"
    with pytest.raises(ConfigError, match="source tree"):
        find_harness(tmp_path)


def test_bench_hands_on_the_harness_exit_code(tmp_path: Path) -> None:
    assert sluice("bench", str(tmp_path / "none.toml")).returncode != 0
    done = sluice("bench", "clean", "--json", SLUICE_BENCH_DIR=str(tmp_path / "bench"))
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["exit_code"] == 0


class Terminal:
    """A stream that says it is a terminal and keeps what is written."""

    def __init__(self) -> None:
        self.text = ""

    def isatty(self) -> bool:
        return True

    def write(self, text: str) -> int:
        self.text += text
        return len(text)

    def flush(self) -> None:
        pass


def test_a_bar_shows_after_a_second_and_leaves_a_clean_line(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock = iter([0.0, 0.5, 1.5, 1.55, 2.5])
    monkeypatch.setattr("sluice.progress.time.monotonic", lambda: next(clock))
    terminal = Terminal()
    with Progress("packing", stream=terminal) as progress:
        progress(1 << 20, 4 << 20)
        assert terminal.text == "", "half a second is no reason for a bar"
        progress(2 << 20, 4 << 20)
        assert "packing" in terminal.text and "2.0 MiB of 4.0 MiB" in terminal.text
        drawn = terminal.text
        progress(3 << 20, 4 << 20)
        assert terminal.text == drawn, "not redrawn twice in a tenth of a second"
        progress(4 << 20, 4 << 20)
        assert "100%" in terminal.text
    assert terminal.text.endswith("\r") and terminal.text.split("\r")[-2].strip() == ""


@pytest.mark.parametrize("value", ["1", "true", "YES", "on"])
def test_no_bar_is_shown_where_bars_are_turned_off(
    value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_DISABLE_PROGRESS_BARS", value)
    assert not Progress("packing", stream=Terminal()).enabled
    monkeypatch.setenv("HF_HUB_DISABLE_PROGRESS_BARS", "0")
    assert Progress("packing", stream=Terminal()).enabled


def test_bytes_are_written_with_the_unit_that_fits() -> None:
    texts = [format_bytes(size) for size in (0, 1023, 1024, 18 << 20, 6 << 30, 5 << 50)]
    assert texts == ["0 B", "1023 B", "1.0 KiB", "18.0 MiB", "6.0 GiB", "5120.0 TiB"]
