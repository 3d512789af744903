"""Every scenario for a GPU in its smoke form: outputs are compared, rows hold what they promise."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import harness  # benchmarks/, by conftest
import run

from .device import emulated

ROOT = Path(__file__).resolve().parents[2]
SCENARIOS = [
    path
    for path in sorted((ROOT / "benchmarks" / "scenarios").glob("*.toml"))
    if harness.load_scenario(path).get("device") == "cuda"
]


@pytest.fixture(autouse=True)
def fresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("SLUICE_BENCH_DIR", str(tmp_path))
    if emulated():
        from sluice import _core

        # What a missing wait for a copy needs to be seen.
        _core.emulation_schedule("forward", "lazy", 3, "default")  # type: ignore[attr-defined]
    yield
    gc.collect()
    if emulated():
        _core.emulation_schedule("forward", "eager", 0, "default")  # type: ignore[attr-defined]


def test_there_are_scenarios() -> None:
    assert len(SCENARIOS) >= 6


@pytest.mark.timeout(300)
@pytest.mark.parametrize("path", SCENARIOS, ids=lambda p: p.stem)
def test_a_scenario_runs_on_the_device(path: Path, request: pytest.FixtureRequest) -> None:
    scenario = harness.smoke(harness.load_scenario(path))
    if emulated() and scenario["phase"] == "gpu-rates" and "SLUICE_GPU_CHILD" not in os.environ:
        # The fake runtime refuses pageable copies from addresses that were registered before, and
        # the system hands out the same again: a process that has registered nothing yet.
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
        command += [f"{Path(__file__)}::{request.node.name}"]
        environment = os.environ | {"SLUICE_GPU_CHILD": "1"}
        child = subprocess.run(command, env=environment, capture_output=True, check=False)
        assert child.returncode == 0, child.stdout.decode()[-4000:]
        return
    rows: list[dict[str, Any]] = run.run_scenario(scenario)
    for row in rows:
        assert row["n"] == len(row["samples"]) == 2 and row["p50"] > 0, row["mode"]
        assert row["correct"].startswith(("bitwise", "tolerance")), row["mode"]
    if scenario["phase"] != "layers":
        return
    modes = {row["mode"] for row in rows}
    shares = [f"{share * 100:g}%" for share in scenario["budget"]["expert_bytes"]]
    assert {f"sluice@{share}" for share in shares} <= modes
    for mode in scenario["workload"]["modes"]:
        assert any(name.split("@")[0] == mode for name in modes), f"{mode} has no row"
    for row in rows:
        counters = row["counters"]
        if "requests" not in counters:
            continue
        total = counters["hits"] + counters["late"] + counters["misses"]
        assert counters["requests"] == pytest.approx(total), row["mode"]
        assert row["limit"]["achieved"] > 0 and row["limit"]["limit_s"] > 0, row["mode"]
    by_mode = {row["mode"]: row["counters"] for row in rows}
    for share in shares:
        if f"lru-overlap@{share}" in by_mode:  # the same policy: overlap moves no other bytes
            overlapped, demanded = by_mode[f"lru-overlap@{share}"], by_mode[f"lru-demand@{share}"]
            assert overlapped["misses"] == demanded["misses"] > 0
