"""Every scenario end to end on a tiny model: outputs are compared, counters are asserted."""

from pathlib import Path

import pytest

import harness
import run

ROOT = Path(__file__).resolve().parents[2]
SCENARIOS = sorted((ROOT / "benchmarks" / "scenarios").glob("*.toml"))


@pytest.fixture(scope="module", autouse=True)
def bench_dir(tmp_path_factory: pytest.TempPathFactory) -> object:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SLUICE_BENCH_DIR", str(tmp_path_factory.mktemp("bench")))
        yield


@pytest.mark.parametrize("path", SCENARIOS, ids=lambda p: p.stem)
def test_a_scenario_runs_and_its_counters_add_up(path: Path) -> None:
    rows = run.run_scenario(harness.smoke(harness.load_scenario(path)))
    assert rows
    for row in rows:
        assert row["n"] == len(row["samples"]) == 2
        assert row["correct"] and row["p50"] > 0
        counters = row["counters"]
        if "late" in counters:
            total = counters["hits"] + counters["late"] + counters["misses"]
            assert counters["requests"] == pytest.approx(total)
