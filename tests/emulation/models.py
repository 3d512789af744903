"""Whole models on the emulated CUDA device: the battery's own check, under chosen schedules.

    python tests/emulation/models.py CORE families      every family, at one slot and at all slots
    python tests/emulation/models.py CORE covering      three families, a covering array

CORE is a `_core*.so` built with SLUICE_EMULATION. Each family runs in a forked child of its own, so
that a fault of a kernel ends that family alone, and its text is the failure. All cells of a family
in one dtype must give the same logits and tokens, bit for bit, and stock's within rounding
(tests/battery/test_models.py); between cells every byte, stream and event must have come back.
"""

from __future__ import annotations

import os
import random
import signal
import sys
import tempfile
import time
import traceback
import zlib
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
    os.environ.setdefault(name, "1")

Row = dict[str, Any]
JOBS = int(os.environ.get("JOBS", "2"))
CHILD_S = 900
# Gated; biased, interleaved and transposed; no gate.
COVERED = ("mixtral", "gpt_oss", "nemotron_h")
SCHEDULE = {
    "order": ("forward", "reverse", "random", "skew"),
    "streams": ("eager", "lazy", "ahead", "random"),
    "stream": ("default", "user"),
}
HOST = {
    "inclusive": {},
    "tight": {"host_memory": "25%"},
    "unpinned": {"pinned_cap": 1},
    "none": {"host_tier": "none"},
}
PREFILL = {"stream": {}, "cache": {"prefill": "cache"}}


def factors() -> dict[str, tuple[Any, ...]]:
    from battery.cells import FACTORS

    return FACTORS | SCHEDULE | {"host": tuple(HOST), "prefill": tuple(PREFILL)}


def rows_of_family(family: str) -> list[Row]:
    """One seeded cell, at one slot and at all."""
    rng = random.Random(zlib.crc32(family.encode()))
    cell = {name: rng.choice(values) for name, values in factors().items()}
    return [cell | {"slots": slots} for slots in ("one", "all")]


def covering(build: str) -> list[Row]:
    """The rows of one build, of three arrays that each cover pairs with the build as well."""
    from battery.pairwise import covering_rows

    rows: list[Row] = []
    for seed in range(3):
        rows += covering_rows(factors() | {"build": ("fast", "checked")}, seed)
    return [row for row in rows if row.pop("build") == build]


def run_family(family: str, rows: list[Row]) -> None:
    """In the child: raises on the first row that fails."""
    import torch
    import transformers

    from battery.cells import Bench
    from battery.families import build_family, causal_families
    from battery.test_models import check_cell
    from sluice import _core

    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    core: Any = _core
    entry = next(entry for entry in causal_families() if entry.family == family)
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(build_family(entry), Path(folder))
        for seed, row in enumerate(rows):
            core.emulation_schedule(row["order"], row["streams"], seed, row["stream"])
            cell = row | {"options": HOST[row["host"]] | PREFILL[row["prefill"]]}
            try:
                check_cell(bench, cell)
            except BaseException as error:
                fault = core.emulation_last_failure()
                raise AssertionError(f"{family}, seed {seed}, {row}: {error}\n{fault}") from error
        core.emulation_schedule("forward", "eager", 0, "default")  # nothing may be left


def child(family: str, rows: list[Row], log: Path) -> int:
    """Forks; the child's output and failure go to `log`."""
    pid = os.fork()
    if pid:
        return pid
    with log.open("w") as out:
        os.dup2(out.fileno(), 1)
        os.dup2(out.fileno(), 2)
        signal.alarm(CHILD_S)
        code = 1
        try:
            run_family(family, rows)
            code = 0
        except BaseException:
            traceback.print_exc()
        out.flush()
        sys.stderr.flush()
        os._exit(code)


def say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def main(core: str, which: str, only: list[str]) -> int:
    os.environ["SLUICE_EMULATED_CORE"] = core
    from emulation.plugin import install

    install()
    import sluice.hf.quantizer  # everything that children share is imported once
    from battery.test_models import OFFLOADED
    from sluice import _core

    del sluice
    build = "checked" if _core.emulation_checked() else "fast"  # type: ignore[attr-defined]
    work = {
        "families": lambda: [(family, rows_of_family(family)) for family in OFFLOADED],
        "covering": lambda: [(family, covering(build)) for family in COVERED],
    }[which]()
    work = [(family, rows) for family, rows in work if not only or family in only]
    running: dict[int, tuple[str, int, float, Path]] = {}
    failed: list[str] = []
    rows_run = 0
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        while work or running:
            while work and len(running) < JOBS:
                family, rows = work.pop(0)
                log = Path(folder) / f"{family}.log"
                running[child(family, rows, log)] = (family, len(rows), time.monotonic(), log)
            pid, status = os.wait()
            family, count, began, log = running.pop(pid)
            rows_run += count
            verdict = "ok" if status == 0 else f"failed ({os.waitstatus_to_exitcode(status)})"
            say(f"{time.monotonic() - began:7.1f} s  {count:3} cells  {family}: {verdict}")
            if status != 0:
                failed.append(family)
                say(log.read_text()[-6000:])
    say(
        f"emulated models ({build}, {which}): {rows_run} cells in {time.monotonic() - start:.0f} s,"
        f" {len(failed)} failed {' '.join(failed)}"
    )
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2], sys.argv[3:]))
