"""The harness itself: stopping, comparing, replaying routes, reporting."""

import dataclasses
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

import compare
import foresight_report
import harness
import machine
import report
import result_tables
import routing
import stop
from baselines import Sample
from end_to_end import link_limit
from sluice import doctor

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
    # Sequence 20 begins at row 4,634 of the published files; layers 1, 9, 17 and 25 of the model.
    assert routes.sequences[0][0].tolist() == [
        [57, 60, 26, 56, 8, 11],
        [22, 12, 13, 44, 27, 31],
        [26, 0, 18, 36, 20, 23],
        [11, 45, 39, 38, 1, 54],
    ]
    assert len(routes.sequences[0]) == 228


@pytest.mark.parametrize("path", SCENARIOS, ids=lambda p: p.stem)
def test_every_scenario_has_a_smoke_form_and_a_title(path: Path) -> None:
    scenario = harness.load_scenario(path)
    small = harness.smoke(scenario)
    assert small["stop"]["max_samples"] == 2
    assert scenario["name"] in report.TITLES | foresight_report.TITLES


def test_a_scenario_with_an_unknown_key_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "bad.toml"
    path.write_text('name = "x"\nkind = "micro"\nmodell = 1\n')
    with pytest.raises(ValueError, match="modell"):
        harness.load_scenario(path)


def test_the_documents_show_exactly_the_committed_rows() -> None:
    committed = result_tables.all_rows(ROOT / "benchmarks" / "results")
    for path, bodies in report.documents(committed).items():
        text = path.read_text()
        assert {name for _, name, _ in result_tables.MARKED.findall(text)} == set(bodies)
        assert result_tables.fill(text, bodies) == text, "run: python benchmarks/report.py --write"


class ArmBesideGpu:
    """An arm whose model has one dense matrix and a session of two layers on "cuda:0"."""

    def __init__(self) -> None:
        self.model = torch.nn.Linear(10, 10, bias=False)
        self.model.get_input_embeddings = lambda: None  # type: ignore[assignment]
        self.model.get_output_embeddings = lambda: None  # type: ignore[assignment]
        store = SimpleNamespace(num_layers=2, layer=lambda _: {"expert_bytes": 1000})
        self.model.sluice = SimpleNamespace(device="cuda:0", store=store)  # type: ignore[assignment]


def test_a_row_beside_a_gpu_says_per_token_what_binds_and_what_is_unexplained() -> None:
    zero = {entry.name: 0.0 for entry in dataclasses.fields(doctor.DeviceConstants)}
    rates = {"memory_bytes_per_s": 1e9, "link_bytes_per_s": 1e6, "round_trip_s": 1e-5}
    named = {"name": "NVIDIA H200", "device": "cuda:0", "copies_bytes_per_s": {}}
    device = doctor.DeviceConstants(**zero | rates | named)  # type: ignore[arg-type]
    arm = ArmBesideGpu()
    assert link_limit.beside_gpu(arm)  # type: ignore[arg-type]
    link = link_limit.LinkLimit(arm, doctor.Constants(1e9, {"4x1MiB": 2e6}, 1.0, device))  # type: ignore[arg-type]
    assert link.limit() == {}
    counters = {"forwards": 8, "requests": 16, "bytes_read": 4000, "bytes_read_demand": 4000}
    counters |= {"host_misses": 2, "store_bytes_read": 9000, "hit_rate": 0.5}
    for _ in range(3):
        link.after(Sample(1.0, [0.002] * 4, [], torch.empty(0), 0.0, counters))
    fields = link.limit()
    assert fields == {
        "limit_s": pytest.approx(0.001 + 400 / 1e9),
        "h2d_s": pytest.approx(0.001),
        "disk_s": pytest.approx(500 / 2e6),
        "experts_s": pytest.approx(4000 / 1e9),
        "dense_s": pytest.approx(400 / 1e9),
        "bound": "h2d",
        "achieved": pytest.approx((0.001 + 400 / 1e9) / 0.002),
        "wasted_hints_s": 0.0,
        "hand_offs": pytest.approx(2.0),
        "hand_off_s": 1e-5,
        "overhead_s": pytest.approx(2e-5),
        "unexplained_s": pytest.approx(0.001 - 400 / 1e9 - 2e-5),
        "constants": "doctor, NVIDIA H200",
        "h2d_bytes_per_s": 1e6,
        "memory_bytes_per_s": 1e9,
        "disk_bytes_per_s": 2e6,
    }


def test_a_prompt_beside_a_gpu_is_one_unit() -> None:
    zero = {entry.name: 1.0 for entry in dataclasses.fields(doctor.DeviceConstants)}
    named = {"name": "NVIDIA H200", "device": "cuda:0", "copies_bytes_per_s": {}}
    device = doctor.DeviceConstants(**zero | named)  # type: ignore[arg-type]
    link = link_limit.LinkLimit(ArmBesideGpu(), doctor.Constants(1.0, {}, 1.0, device))  # type: ignore[arg-type]
    link.after(Sample(4.0, [], [], torch.empty(0), 0.0, {"forwards": 2, "bytes_read_demand": 10}))
    assert link.limit()["h2d_s"] == 10.0
    assert link.limit()["achieved"] == pytest.approx((10.0 + 400.0) / 4.0)


def test_an_arm_without_a_gpu_has_no_link() -> None:
    assert not link_limit.beside_gpu(SimpleNamespace(model=None))  # type: ignore[arg-type]
    on_cpu = SimpleNamespace(model=SimpleNamespace(sluice=SimpleNamespace(device="cpu")))
    assert not link_limit.beside_gpu(on_cpu)  # type: ignore[arg-type]


def test_a_row_beside_a_gpu_shows_its_link_and_its_disk_apart() -> None:
    counters = {"bytes_read": 3e6, "store_bytes_read": 1e6}
    on_cpu = a_row(counters=counters, limit={"achieved": 0.5})
    on_gpu = a_row(counters=counters, limit={"achieved": 0.5, "h2d_s": 1.0, "bound": "h2d"})
    assert (report.moved(on_cpu), report.over_link(on_cpu), report.bound(on_cpu)) == ("3", "–", "–")
    assert (report.moved(on_gpu), report.over_link(on_gpu), report.bound(on_gpu)) == (
        "1",
        "3",
        "h2d",
    )


def test_results_of_a_gpu_have_a_folder_of_their_own() -> None:
    cpu = {"cpu": "AMD EPYC 9654 Processor", "cores": 16, "ram_gib": 128.0, "gpu": None}
    assert machine.slug(cpu) == "amd-epyc-9654-16c-128g"
    assert machine.slug(cpu | {"gpu": {"name": "NVIDIA H200"}}) == (
        "nvidia-h200-amd-epyc-9654-16c-128g"
    )
