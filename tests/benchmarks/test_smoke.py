"""Every scenario end to end on a tiny model: outputs are compared, counters are asserted."""

from pathlib import Path
from typing import Any

import pytest

import harness
import run
from sluice import _core

ROOT = Path(__file__).resolve().parents[2]
SCENARIOS = sorted((ROOT / "benchmarks" / "scenarios").glob("*.toml"))


@pytest.fixture(scope="module", autouse=True)
def bench_dir(tmp_path_factory: pytest.TempPathFactory) -> object:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SLUICE_BENCH_DIR", str(tmp_path_factory.mktemp("bench")))
        yield


@pytest.mark.parametrize("path", SCENARIOS, ids=lambda p: p.stem)
def test_a_scenario_runs_and_its_counters_add_up(path: Path) -> None:
    scenario = harness.load_scenario(path)
    if scenario.get("device") == "cuda" and scenario["phase"] != "layers" and not on_device():
        pytest.skip("a GPU's kernels, or its rates; on the emulation in tests/gpu")
    rows = run.run_scenario(harness.smoke(scenario))
    assert rows
    if scenario["kind"] == "replay":
        check_replay(rows)
        return
    for row in rows:
        assert row["n"] == len(row["samples"]) == 2
        assert row["correct"] and row["p50"] > 0
        counters = row["counters"]
        if "late" in counters:
            total = counters["hits"] + counters["late"] + counters["misses"]
            assert counters["requests"] == pytest.approx(total)
    # What "all resident" takes is the same for everybody, but for the padding of tiny slots.
    whole = [row["memory"].get("expert_bytes_granted") for row in rows if is_resident(row)]
    assert all(size == pytest.approx(whole[0], rel=0.2) for size in whole)


def check_replay(rows: list[dict[str, Any]]) -> None:
    """LRU closes nothing of the gap, Belady all of it, everybody else less; recalls are shares."""
    gaps = {row["mode"]: row["p50"] for row in rows if row["metric"] == "gap_closed"}
    for mode, gap in gaps.items():
        name = mode.partition(": ")[2]
        assert gap == {"lru": 0, "belady": 1}.get(name, gap) and (name == "belady" or gap < 1)
    recalls = [row["p50"] for row in rows if row["metric"] == "recall_at_k"]
    assert bool(gaps) == bool(rows[0]["config"]["workload"]["streams"])
    assert recalls and all(0 < recall < 1 for recall in recalls)


def on_device() -> bool:
    return _core.build_info()["cuda"] != "none" and _core.num_cuda_devices() > 0


def is_resident(row: dict[str, Any]) -> bool:
    return row["mode"].startswith("resident-") and row["phase"] in {"decode", "prefill"}
