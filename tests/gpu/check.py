"""make gpu-check: everything that only a GPU can say, in stages that fit a short loan of one.

    python tests/gpu/check.py correct|bandwidth|rows|sanitize [--out DIR] [--budget-s 450]
    python tests/gpu/check.py all --dry-run     lists the steps and what they are expected to take
    python tests/gpu/check.py bars              lays the rows that are there beside their bars

Needs Python with torch, pytest and pybind11, cmake, ninja, nvcc; no network, no GoogleTest. Builds
for one architecture into build/gpu and runs from there; nothing is installed. Each step is a few
processes with a log each; what passed at this commit is not run again, so that a stage which was
cut off goes on where it stopped. Where $OUT names a folder, all of it goes there as one archive
after every step, and `--resume ARCHIVE` takes it up again elsewhere. Without git SLUICE_COMMIT says
which commit this is ("-dirty" behind it where it differs).

Exit code: 0 all passed, 1 something failed, 2 no GPU, 3 the budget ended first.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
BUILD = ROOT / "build" / "gpu"
SITE = BUILD / "site"
NATIVE = BUILD / "native"
STAGES = ("correct", "bandwidth", "rows", "sanitize")
ARCHITECTURE = os.environ.get("SLUICE_GPU_ARCHITECTURE", "90a-real")
PYTEST = (sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-rfE", "--tb=short")
CORES = os.cpu_count() or 2


@dataclass(frozen=True)
class Step:
    """One entry of the log. `commands` run side by side; all must succeed.

    `expected_s` is a guess until a GPU has run it, and decides whether the step still fits the
    budget; `limit_s` ends it.
    """

    stage: str
    name: str
    expected_s: int
    commands: tuple[tuple[str, ...], ...]
    limit_s: int = 300


def tests(name: str, *options: str) -> tuple[str, ...]:
    return (*PYTEST, f"tests/gpu/{name}", *options)


def bench(out: Path, scenario: str, *options: str) -> tuple[str, ...]:
    file = f"benchmarks/scenarios/{scenario}.toml"
    return (sys.executable, "benchmarks/run.py", file, "--out", str(out / "results"), *options)


def steps(out: Path) -> list[Step]:
    """All stages' steps in their order: what the rest depends on comes first.

    The sessions' tests and whatever is timed have the device to themselves: they read what memory
    is free, and clocks.
    """
    shards = min(8, max(1, CORES // 2))
    families = tuple(
        ("env", f"SLUICE_GPU_SHARD={n}/{shards}", *tests("test_battery.py")) for n in range(shards)
    )
    alone = tuple(tests(f"test_{name}.py") for name in ("probes", "semantics", "kernels"))
    plan = [
        Step("correct", "wrappers, runtime, kernels", 60, alone),
        Step("correct", "sessions", 60, (tests("test_sessions.py"),)),
        Step("correct", "families, scenarios", 150, (*families, tests("test_benchmarks.py"))),
        Step("bandwidth", "rates", 90, (bench(out, "gpu-rates"),)),
        Step("bandwidth", "decode qwen3", 50, (bench(out, "decode-kernel-gpu-qwen3-30b"),)),
        Step("bandwidth", "decode mixtral", 50, (bench(out, "decode-kernel-gpu-mixtral"),)),
    ]
    for scenario, shares in ROWS.items():
        for share, seconds in shares.items():
            command = bench(out, scenario, "--share", share)
            plan.append(Step("rows", f"{scenario} {share}%", seconds, (command,), limit_s=400))
    watched: list[tuple[str, ...]] = []
    for tool in TOOLS:
        prefix = sanitizer(tool, "--kernel-name", "kns=sluice")  # not torch's own kernels
        watched.append((*prefix, *tests("test_kernels.py", "-x", "-k", SANITIZED_KERNELS)))
        watched.append((*prefix, *tests("test_sessions.py", "-x", "-k", "fp64 and bfloat16")))
    planted = (sys.executable, str(Path(__file__)), "planted", "--out", str(out))
    plan.append(Step("sanitize", "planted bugs", 120, (planted,)))
    plan.append(Step("sanitize", "kernels and a session", 180, tuple(watched), limit_s=320))
    return plan


# Scenario -> share of the experts in slots -> seconds expected. What the bars ask for comes first.
ROWS = {
    "qwen3-30b-layers-gpu": {"25": 45, "12.5": 45, "40": 45, "100": 30},
    "mixtral-cut-gpu": {"50": 90, "25": 60, "100": 40},
    "mixtral-cut-gpu-disk": {"25": 80, "50": 60},
    "mixtral-layers-gpu": {"50": 150, "25": 170, "100": 110},
}
TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")
SANITIZED_KERNELS = (
    "routing or combining or (small_integers and (BF16-BF16 or F32-F32)) or starts_early"
)


def sanitizer(tool: str, *options: str) -> tuple[str, ...]:
    """compute-sanitizer, failing where it finds something."""
    found = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    return (found, "--tool", tool, "--error-exitcode", "9", *options)


# ---- building ----


def tree_commit() -> str:
    """As rows name it: of git, else what SLUICE_COMMIT says."""
    run = subprocess.run(
        ["git", "-C", str(ROOT), "rev-parse", "--short=12", "HEAD"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    return run.stdout.strip() or os.environ.get("SLUICE_COMMIT", "unknown")


def build(out: Path) -> bool:
    """_core, _ops, and what the tests call, into build/gpu; ninja does only what has changed."""
    nvcc = shutil.which("nvcc") or "/usr/local/cuda/bin/nvcc"
    pybind11 = subprocess.run(
        [sys.executable, "-m", "pybind11", "--cmakedir"], capture_output=True, text=True, check=True
    ).stdout.strip()
    configure = ["cmake", "-G", "Ninja", "-S", str(ROOT), "-B", str(NATIVE), "-Wno-dev",
                 "-DSLUICE_CUDA=ON", f"-DCMAKE_CUDA_ARCHITECTURES={ARCHITECTURE}",
                 f"-DCMAKE_CUDA_COMPILER={nvcc}", "-DSLUICE_GPU_TESTS=ON",
                 f"-Dpybind11_DIR={pybind11}", f"-DPython_EXECUTABLE={sys.executable}",
                 "-DSKBUILD_PROJECT_VERSION=0"]  # fmt: skip
    commands = [
        configure,
        ["cmake", "--build", str(NATIVE), "-j", str(CORES)],
        ["cmake", "--install", str(NATIVE), "--component", "python", "--prefix", str(SITE)],
    ]
    log = out / "logs" / "build.log"
    with log.open("w") as file:
        for command in commands:
            file.write("$ " + " ".join(command) + "\n")
            file.flush()
            if subprocess.run(command, stdout=file, stderr=file, check=False).returncode != 0:
                say(log.read_text()[-4000:])
                return False
    shutil.copytree(ROOT / "python" / "sluice", SITE / "sluice", dirs_exist_ok=True)
    return True


def environment() -> dict[str, str]:
    return os.environ | {
        "PYTHONPATH": os.pathsep.join([str(SITE), os.environ.get("PYTHONPATH", "")]),
        "PYTHONUNBUFFERED": "1",
        "PYTHONDONTWRITEBYTECODE": "1",
        "SLUICE_REQUIRE_CUDA": "1",
        "SLUICE_GPU_TESTS": str(next(iter(NATIVE.rglob("libsluice_gpu_tests.so")), "")),
        "SLUICE_BENCH_DIR": os.environ.get("SLUICE_BENCH_DIR", str(BUILD / "bench")),
        "SLUICE_COMMIT": os.environ.get("SLUICE_COMMIT", ""),
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
    }


def wrong_package() -> str:
    """Empty where the steps import what was built: an editable install would come before it."""
    code = "from sluice import _core; print(_core.__file__)"
    command = [sys.executable, "-c", code]
    run = subprocess.run(
        command, env=environment(), cwd=BUILD, capture_output=True, text=True, check=False
    )
    if run.returncode != 0:
        return f"the package that was built cannot be imported: {run.stderr[-2000:]}"
    if not run.stdout.startswith(str(SITE)):
        return (
            f"got sluice from {run.stdout.strip()}, expected it from {SITE}; uninstall it there, "
            "or use a Python that has none"
        )
    return ""


def missing_gpu() -> str:
    """Empty where there is one."""
    query = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    try:
        run = subprocess.run(query, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return "no nvidia-smi found"
    return "" if run.returncode == 0 and run.stdout.strip() else f"nvidia-smi: {run.stdout.strip()}"


# ---- running ----


def say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def archive(out: Path) -> None:
    """Everything so far as one file in $OUT, where that names a folder."""
    target = os.environ.get("OUT")
    if target:
        shutil.make_archive(str(Path(target) / "gpu-check"), "gztar", out)


class State:
    """What has been run at which commit: a line of JSON each, appended as it ends."""

    def __init__(self, out: Path, commit: str) -> None:
        self.path, self.commit = out / "state.jsonl", commit
        self.passed: set[tuple[str, str]] = set()
        if self.path.exists():
            for line in self.path.read_text().splitlines():
                entry = json.loads(line)
                if entry["commit"] == commit and entry["passed"]:
                    self.passed.add((entry["stage"], entry["step"]))

    def add(self, step: Step, passed: bool, seconds: float, closing: str) -> None:
        entry = {"stage": step.stage, "step": step.name, "passed": passed, "commit": self.commit,
                 "seconds": round(seconds, 1), "closing": closing,
                 "time_utc": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())}  # fmt: skip
        with self.path.open("a") as file:
            file.write(json.dumps(entry) + "\n")
        if passed:
            self.passed.add((step.stage, step.name))


def log_names(step: Step) -> Iterator[str]:
    stem = re.sub(r"[^a-z0-9]+", "-", f"{step.stage} {step.name}".lower()).strip("-")
    for number in range(len(step.commands)):
        yield f"{stem}.log" if len(step.commands) == 1 else f"{stem}-{number}.log"


def run_step(step: Step, out: Path, limit_s: float) -> tuple[bool, str]:
    """Whether all of its commands succeeded, and the last line of each log."""
    logs = [out / "logs" / name for name in log_names(step)]
    running: list[subprocess.Popen[bytes]] = []
    for command, log in zip(step.commands, logs, strict=True):
        with log.open("w") as file:
            process = subprocess.Popen(
                command,
                cwd=ROOT,
                env=environment(),
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            running.append(process)
    deadline = time.monotonic() + limit_s
    codes: list[int] = []
    for process in running:
        try:
            codes.append(process.wait(max(0.1, deadline - time.monotonic())))
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)  # its own session: nobody else's processes
            process.wait()
            codes.append(124)
    closings = [(log.read_text(errors="replace").strip().splitlines() or [""])[-1] for log in logs]
    return all(code == 0 for code in codes), "; ".join(
        f"exit {code}, {closing[-160:]}" if code else closing[-160:]
        for code, closing in zip(codes, closings, strict=True)
    )


def run_stages(stages: Sequence[str], out: Path, budget_s: float) -> int:
    began = time.monotonic()
    if missing := missing_gpu():
        say(f"gpu-check: no GPU here ({missing}); --dry-run lists what would run")
        return 2
    (out / "logs").mkdir(parents=True, exist_ok=True)
    if not build(out):
        say(f"gpu-check: the build failed; see {out / 'logs' / 'build.log'}")
        return 1
    if wrong := wrong_package():
        say(f"gpu-check: {wrong}")
        return 1
    say(f"{time.monotonic() - began:7.1f} s  built")
    state = State(out, tree_commit())
    failed, left = 0, 0
    for step in steps(out):
        if step.stage not in stages:
            continue
        if (step.stage, step.name) in state.passed:
            say(f"         passed before  {step.stage}: {step.name}")
            continue
        rest = budget_s - (time.monotonic() - began)
        if rest < step.expected_s:
            say(
                f"         left: {step.stage}: {step.name} ({step.expected_s} s, {rest:.0f} s left)"
            )
            left += 1
            continue
        start = time.monotonic()
        passed, closing = run_step(step, out, min(step.limit_s, rest))
        seconds = time.monotonic() - start
        state.add(step, passed, seconds, closing)
        archive(out)
        failed += not passed
        verdict = "ok" if passed else "FAILED"
        say(f"{seconds:7.1f} s  {step.stage}: {step.name}: {verdict}: {closing}")
    if {"bandwidth", "rows"} & set(stages):
        bars(out)
    took = time.monotonic() - began
    say(f"gpu-check {' '.join(stages)}: {failed} failed, {left} left, {took:.0f} s; see {out}")
    return 1 if failed else 3 if left else 0


def dry_run(stages: Sequence[str], out: Path) -> int:
    total = 0
    for step in steps(out):
        if step.stage in stages:
            total += step.expected_s
            many = f" ({len(step.commands)} processes)" if len(step.commands) > 1 else ""
            say(f"{step.expected_s:5} s  {step.stage}: {step.name}{many}")
            say(f"         {' '.join(shorter(step.commands[0]))}")
    say(f"{total:5} s  in all, expected, beside a minute or two for the build; no GPU has said so")
    return 0


def bars(out: Path) -> int:
    """The rows beside what is asked of them: 0.8 of the limit, and not slower than LRU."""
    sys.path.insert(0, str(ROOT / "benchmarks"))
    from compare import load_rows, verdict

    rows = [r for path in sorted((out / "results").rglob("*.jsonl")) for r in load_rows(path)]
    newest = {(r["scenario"], r["mode"], r["metric"]): r for r in rows}
    for (scenario, mode, metric), row in newest.items():
        achieved = row["limit"].get("achieved")
        if mode.startswith("sluice@") and achieved:
            share = mode.partition("@")[2]
            rival = newest.get((scenario, f"lru-overlap@{share}", metric))
            beside = f"; beside lru-overlap: {verdict(row, rival)}" if rival else ""
            say(f"bar {scenario} {share}: {achieved:.3f} of the limit (0.8){beside}")
        elif mode == "decode-pair" and row["config"]["layer_bytes"] >= 50e6:
            of_copy = row["limit"].get("achieved_of_copy", float("nan"))
            say(f"bar {scenario} {metric}: {of_copy:.3f} of a copy's rate (0.8)")
    if not newest:
        say(f"bars: no rows in {out / 'results'}")
    return 0


def shorter(command: Sequence[str]) -> Iterator[str]:
    for word in command:
        yield "python" if word == sys.executable else word.replace(str(ROOT) + "/", "")


# ---- the planted bugs under compute-sanitizer ----


def our_verdicts() -> dict[str, list[str]]:
    """Of planted_test.cc: what each bug ends in on the emulation, per build, as its row says."""
    text = (ROOT / "tests/emulation/planted/planted_test.cc").read_text()
    table = text[text.index("kPlanted[] = {") : text.index("void PrintTo")]
    found: dict[str, list[str]] = {}
    for row in re.split(r"\n    \{(?=\")", table)[1:]:
        strings = re.findall(r'"((?:[^"\\]|\\.)*)"', row)
        found[strings[0]] = strings[1:]
    return found


def planted(out: Path) -> int:
    """Every bug natively and under each tool, its verdict beside the emulation's, as JSON lines."""
    program = next(iter(NATIVE.rglob("sluice_planted")), None)
    if program is None:
        say("gpu-check planted: no sluice_planted in build/gpu; run the stage sanitize")
        return 2
    if shutil.which(sanitizer("memcheck")[0]) is None:
        say("gpu-check planted: no compute-sanitizer found; it comes with the CUDA toolkit")
        return 2
    names = subprocess.run([str(program)], capture_output=True, text=True, check=True).stdout
    ours = our_verdicts()
    jobs = [
        (name, tool)
        for name in names.split()
        for tool in ("native", "memcheck", "racecheck", "initcheck", "synccheck")
    ]
    found: dict[str, dict[str, Any]] = {name: {"bug": name} for name in names.split()}
    running: dict[subprocess.Popen[str], tuple[str, str, float]] = {}
    while jobs or running:
        while jobs and len(running) < min(8, CORES):
            name, tool = jobs.pop(0)
            prefix = () if tool == "native" else sanitizer(tool)
            process = subprocess.Popen([*prefix, str(program), name], stdout=subprocess.PIPE,
                                       stderr=subprocess.STDOUT, text=True,
                                       start_new_session=True)  # fmt: skip
            running[process] = (name, tool, time.monotonic())
        time.sleep(0.05)
        for process, (name, tool, began) in list(running.items()):
            late = time.monotonic() - began > 60
            if process.poll() is None and not late:
                continue
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
            said = process.communicate()[0]
            found[name][tool] = "hangs" if late else verdict(tool, said)
            del running[process]
    with (out / "planted.jsonl").open("w") as file:
        for entry in found.values():
            row = entry | {"emulation": ours.get(entry["bug"], [])}
            file.write(json.dumps(row) + "\n")
            say(json.dumps(row))
    clean = [e for e in found.values() if e["bug"].startswith("Control")]
    wrong = [
        f"{e['bug']}, {tool}: {e[tool]}"
        for e in clean
        for tool in e
        if tool != "bug" and e[tool] not in ("right result", "clean")
    ]
    say(f"planted: {len(found)} programs, {len(wrong)} controls not clean {'; '.join(wrong)}")
    return bool(wrong)


def verdict(tool: str, said: str) -> str:
    """A run in a few words: the program's own end, or the first thing a tool says."""
    if tool == "native":
        end = re.search(r"^planted \w+: (.*)$", said, re.MULTILINE)
        return end[1] if end else said.strip()[-200:]
    if "ERROR SUMMARY: 0 errors" in said or "RACECHECK SUMMARY: 0 hazards" in said:
        return "clean"
    for line in said.splitlines():
        text = line.lstrip("= ")
        if text and not text.startswith(("COMPUTE-SANITIZER", "planted", "ERROR SUMMARY")):
            return text[:200]
    return said.strip()[-200:]


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("stage", choices=(*STAGES, "all", "planted", "bars"))
    parser.add_argument("--out", type=Path, default=BUILD / "out")
    parser.add_argument("--resume", type=Path, help="an archive that an earlier run left in $OUT")
    parser.add_argument("--budget-s", type=float, default=450)
    parser.add_argument("--dry-run", action="store_true")
    args = parser.parse_args()
    if args.resume is not None:
        shutil.unpack_archive(args.resume, args.out, "gztar")
    stages = STAGES if args.stage == "all" else (args.stage,)
    if args.stage == "planted":
        return planted(args.out)
    return (
        dry_run(stages, args.out) if args.dry_run else run_stages(stages, args.out, args.budget_s)
    )


if __name__ == "__main__":
    sys.exit(main())
