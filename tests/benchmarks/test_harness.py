"""The harness itself: stopping, comparing, replaying routes, reporting."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import compare
import harness
import report
import routing
import stop

ROOT = Path(__file__).resolve().parents[2]
SCENARIOS = sorted((ROOT / "benchmarks" / "scenarios").glob("*.toml"))


def a_row(**fields: Any) -> dict[str, Any]:
    row = {
        "id": "a", "scenario_sha256": "s", "metric": "m", "phase": "decode", "machine": "x",
        "data": "d", "dirty": False, "n": 12, "better": "lower", "samples": [1.0] * 12,
    }  # fmt: skip
    return {**row, **fields}


def test_a_quiet_series_stops_at_the_minimum_and_a_noisy_one_at_the_maximum() -> None:
    rule = stop.StopRule(min_samples=3, max_samples=5, relative_spread=0.03, timeout_s=1e9)
    assert rule.reason([1.0, 1.0]) is None
    assert rule.reason([1.0, 1.0, 1.0]) == "spread"
    assert rule.reason([1.0, 2.0, 3.0]) is None
    assert rule.reason([1.0, 2.0, 3.0, 1.0, 2.0]) == "max"


def test_quantiles_are_ordered_and_of_one_sample_that_sample() -> None:
    assert stop.quantiles([4.0]) == (4.0, 4.0, 4.0)
    low, middle, high = stop.quantiles([float(i) for i in range(11)])
    assert (low, middle, high) == (2.0, 5.0, 8.0)


def test_a_clear_win_is_faster_and_an_equal_series_is_the_same() -> None:
    slow, fast = a_row(samples=[2.0] * 12), a_row(id="b", samples=[1.0] * 12)
    assert compare.verdict(fast, slow).startswith("FASTER")
    assert compare.verdict(slow, fast).startswith("SLOWER")
    assert compare.verdict(slow, slow).startswith("SAME")


@pytest.mark.parametrize(
    ("fields", "word"),
    [({"dirty": True}, "dirty"), ({"n": 3}, "samples"), ({"machine": "y"}, "machine")],
)
def test_rows_that_cannot_be_compared_are_unclear(fields: dict[str, Any], word: str) -> None:
    verdict = compare.verdict(a_row(**fields), a_row(id="b"))
    assert verdict.startswith("UNCLEAR") and word in verdict


def test_a_retracted_row_is_not_loaded(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"id": "a"}\n{"id": "b"}\n{"retracts": "a", "why": "wrong"}\n')
    assert [row["id"] for row in compare.load_rows(path)] == ["b"]


def test_sticky_routes_have_distinct_experts_and_repeat_for_the_same_seed() -> None:
    make = lambda: routing.sticky(  # noqa: E731
        experts=16, layers=2, top_k=4, tokens=32, sequences=2, stickiness=0.5, seed=3
    )
    first, again = make(), make()
    assert first.sha256 == again.sha256
    for sequence in first.sequences:
        assert sequence.shape == (32, 2, 4)
        assert all(len(set(ids)) == 4 for token in sequence for ids in token)
    kept = [len(set(a) & set(b)) for a, b in zip(sequence[:-1, 0], sequence[1:, 0], strict=True)]
    assert np.mean(kept) > 1.5  # independent draws of 4 of 16 would share 1


def test_recorded_routes_are_those_of_the_named_layers() -> None:
    routes = routing.recorded("dsv2lite_translation_l1_9_17_25", 20, 21)
    assert [s.shape[1:] for s in routes.sequences] == [(4, 6), (4, 6)]
    assert max(s.max() for s in routes.sequences) < 64


@pytest.mark.parametrize("path", SCENARIOS, ids=lambda p: p.stem)
def test_every_scenario_has_a_smoke_form_and_a_title(path: Path) -> None:
    scenario = harness.load_scenario(path)
    small = harness.smoke(scenario)
    assert small["stop"]["max_samples"] == 2
    assert scenario["name"] in report.TITLES


def test_a_scenario_with_an_unknown_key_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "bad.toml"
    path.write_text('name = "x"\nkind = "micro"\nmodell = 1\n')
    with pytest.raises(ValueError, match="modell"):
        harness.load_scenario(path)


def test_the_readme_shows_exactly_the_committed_rows() -> None:
    readme = (ROOT / "README.md").read_text()
    body = report.tables(ROOT / "benchmarks" / "results")
    assert report.rewrite(readme, body) == readme, "run: python benchmarks/report.py --write"
