"""Whole models on the emulated CUDA device: the battery's own check, under chosen schedules.

    python tests/emulation/models.py CORE families      every family, at one slot and at all slots
    python tests/emulation/models.py CORE covering      three families, a covering array

CORE is a `_core*.so` built with SLUICE_EMULATION. Each family runs in a forked child of its own, so
that a fault of a kernel ends that family alone, and its text is the failure. All cells of a family
in one dtype must give the same logits and tokens, bit for bit; stock's within rounding
(tests/battery/tolerance.py); and those of the CPU tier within `TIERS_APART`. Between cells every
byte, stream and event must have come back.
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
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from battery.cells import Bench

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
    os.environ.setdefault(name, "1")

Row = dict[str, Any]

# How far logits of the emulated GPU may lie from those of the CPU tier, as a share of the largest
# one, experts chosen alike: 64, 4 and 8 units in the last place of the type. Both tiers add
# products in fp32, in another order each (tiles of 16 here; vector lanes or torch's GEMM there),
# and in fp32 that is all: 21 units were seen. In bf16 and fp16 the GPU rounds h and the result, the
# CPU also gate, up and what w2 gives where an expert has many tokens; a value that falls to another
# neighbour by that, or by the order, takes its unit through the layers behind: 2.1 and 3.8 seen.
TIERS_APART = {"fp32": 2.0**-17, "bf16": 2.0**-5, "fp16": 2.0**-7}
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

        cpu: dict[str, torch.Tensor] = {}
        for seed, row in enumerate(rows):
            dtype = row["dtype"] if row["dtype"] in bench.dtypes else "fp32"
            if dtype not in cpu:
                cpu[dtype] = logits_of_the_cpu_tier(bench, dtype)
            core.emulation_schedule(row["order"], row["streams"], seed, row["stream"])
            cell = row | {"options": HOST[row["host"]] | PREFILL[row["prefill"]]}
            try:
                apart = distance(check_cell(bench, cell), cpu[dtype])
                assert apart <= TIERS_APART[dtype], (
                    f"logits in {dtype}: got {apart:.2g} between the tiers, expected at most "
                    f"{TIERS_APART[dtype]:.2g} of the largest one"
                )
            except BaseException as error:
                fault = core.emulation_last_failure()
                raise AssertionError(f"{family}, seed {seed}, {row}: {error}\n{fault}") from error
        core.emulation_schedule("forward", "eager", 0, "default")  # nothing may be left


def logits_of_the_cpu_tier(bench: Bench, dtype: str) -> torch.Tensor:
    """Of the prompt, on stock's routes. Such that a wrong expert is further away than the tiers."""
    from battery.cells import run_on_routes
    from sluice import _core

    core: Any = _core
    sites, routes = bench.built.sites, bench.reference(dtype).routes
    cell = {"slots": "quarter", "policy": "lru", "backing": "spilled", "dtype": dtype}
    core.emulation_tier("cpu")
    try:
        with bench.offloaded(cell) as model:
            assert model.sluice.stats().host_tier_bytes == 0
            logits = run_on_routes(model, sites, bench.ids, routes)
    finally:
        core.emulation_tier("cuda")
    model = bench.stock(dtype)
    weights = model.get_submodule(sites[-1]).down_proj.data
    used = int(routes[bench.reference(dtype).calls_per_forward - 1][0][0, 0])
    kept = weights[used].clone()
    weights[used] = 0
    wrong = distance(run_on_routes(model, sites, bench.ids, routes), logits)
    weights[used] = kept
    assert wrong > TIERS_APART[dtype], (
        f"a zeroed expert moves logits in {dtype} by {wrong:.2g} only"
    )
    return logits


def distance(logits: torch.Tensor, others: torch.Tensor) -> float:
    """The largest difference, as a share of the largest logit."""
    return float((logits.double() - others.double()).abs().max() / others.double().abs().max())


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
