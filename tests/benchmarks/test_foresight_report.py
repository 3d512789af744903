"""foresight.md's tables: hand-made rows in, cells out."""

from typing import Any

import pytest

import foresight_report


def a_row(mode: str, metric: str, scenario: str = "replay-dsv2lite", **derived: Any) -> Any:
    """A clean row of two seeds."""
    return {
        "scenario": scenario, "mode": mode, "metric": metric, "dirty": False, "n": 2,
        "samples": [0.2, 0.4], "derived": derived, "commit": "c0ffee", "threads": 2,
        "time_utc": "2026-01-01T00:00:00Z", "machine": {"cpu": "A CPU", "ram_gib": 8.0},
    }  # fmt: skip


def replayed(mode: str, gaps: tuple[float, float], hits: tuple[float, float]) -> Any:
    derived: dict[str, Any] = {"gap_0.5": gaps[1], "hits_0.5": hits[1]}
    derived |= {"gap_0.125": gaps[0], "hits_0.125": hits[0]}
    if ", batch " not in mode:
        derived |= {"low": 0.1, "high": 0.5, "without_shared_tokens": 0.25}
    return a_row(mode, "gap_closed", **derived)


REPLAY = [
    replayed("mix: lru", (0.0, 0.0), (0.3, 0.7)),
    replayed("mix: edge:printed", (0.2, 0.0), (0.35, 0.7)),
    replayed("mix: forecaster", (0.1, 0.5), (0.32, 0.8)),
    replayed("mix: belady", (1.0, 1.0), (0.5, 0.9)),
    replayed("mix: belady-no-bypass", (0.6, 0.4), (0.45, 0.75)),
    replayed("mix, batch 4: lru", (0.0, 0.0), (0.2, 0.6)),
    replayed("mix, batch 16: lru", (0.0, 0.0), (0.1, 0.5)),
]


def recalled(mode: str, recall: float, scenario: str = "replay-dsv2lite", many: int = 25) -> Any:
    derived: dict[str, Any] = {"fit_s": 12.345}
    for horizon in ("token", "1"):
        for n, more in ((6, 0.0), (12, 0.1)):
            name = f"{horizon}: recall@{n}"
            derived |= {
                name: recall + more,
                f"{name} low": recall - 0.05,
                f"{name} high": recall + 0.05,
                f"{name} worst task": recall - 0.1,
                f"{horizon}: precision@{n}": recall / 2,
            }
        derived |= {
            f"{horizon}: recall@6 by layer": [i / 100 for i in range(1, many + 1)],
            f"{horizon}: exact set": 0.031,
            f"{horizon}: calibration error": 0.0123,
        }
        for batch in (1, 16):
            for size, found in (("1", 0.5), ("1.15", 0.6), ("all", 1.0)):
                name = f"{horizon}: batch {batch}, {size} x the true set"
                derived |= {f"{name}: b_acc": found, f"{name}: precision": found / batch}
    return a_row(mode, "recall_at_k", scenario, **derived)


RECALL = [recalled(*each) for each in (("popularity", 0.2), ("path-table", 0.6))] + [
    recalled("previous-token", 0.3)
]
LEFT_OUT = [
    recalled(f"path-table without {task}", recall, "recall-dsv2lite-left-out")
    for task, recall in (("intent", 0.5), ("summary", 0.4))
]


def cells(markdown: str) -> list[list[str]]:
    """Of the last table in a text, its head first."""
    lines = markdown.strip().split("\n\n")[-1].splitlines()
    return [line.strip("| ").split(" | ") for line in lines if not line.startswith("| ---")]


def test_who_should_stay_is_of_batch_1_with_slots_in_order() -> None:
    head, *lines = cells(foresight_report.stay(REPLAY)[0])
    assert head[2:4] == ["hits %, slots 12.5 / 50 %", "gap closed %, by slots"]
    assert len(lines) == 5
    assert lines[1] == [
        "mix", "`edge:printed`", "35.0 / 70.0", "20.0 / 0.0", "30.0 [10.0, 50.0]", "25.0", "2",
    ]  # fmt: skip


def test_what_is_left_of_the_gap_is_admission_and_victim_choice() -> None:
    _, *lines = cells(foresight_report.admission(REPLAY)[0])
    assert lines == [
        ["mix", "12.5 %", "`edge:printed`", "20.0", "60.0", "50.0", "50.0"],
        ["mix", "50 %", "`forecaster`", "50.0", "40.0", "120.0", "-20.0"],
    ]


def test_without_the_forced_belady_its_cells_are_dashes() -> None:
    other = [row | {"mode": row["mode"].replace("mix", "balanced")} for row in REPLAY[:4]]
    head, *lines = cells(foresight_report.admission([*REPLAY, *other])[0])
    assert len(head) == 7 and len(lines) == 4
    assert lines[2] == ["balanced", "12.5 %", "`edge:printed`", "20.0", "–", "–", "–"]
    assert cells(foresight_report.admission(REPLAY[:4])[0])[0] == head[:4]


def test_where_belady_saves_nothing_stands_a_dash() -> None:
    nothing = {"gap_0.5": None, "low": None, "high": None, "without_shared_tokens": None}
    run = [row | {"derived": row["derived"] | nothing} for row in REPLAY]
    assert cells(foresight_report.stay(run)[0])[2] == [
        "mix", "`edge:printed`", "35.0 / 70.0", "20.0 / –", "30.0 [–, –]", "2",
    ]  # fmt: skip
    assert cells(foresight_report.admission(run)[0])[2] == ["mix", "50 %", "–", "–", "–", "–", "–"]


def test_grids_stand_side_by_side_for_who_ran_at_every_batch() -> None:
    assert cells(foresight_report.grids(REPLAY)[-1]) == [
        ["stream", "policy", "batch 1", "batch 4", "batch 16"],
        ["mix", "`lru`", "30.0 / 70.0", "20.0 / 60.0", "10.0 / 50.0"],
    ]


def test_recall_stands_beside_precision_at_each_horizon() -> None:
    parts = foresight_report.come_next(RECALL)
    assert parts[::2] == ["A token ahead, before layer 0 runs:", "One layer ahead:"]
    assert cells(parts[1])[2] == [
        "`path-table`", "60.0 [55.0, 65.0]", "50.0", "30.0", "70.0 / 30.0", "3.1", "1.23", "2",
    ]  # fmt: skip


@pytest.mark.parametrize(("many", "shown"), [(7, range(1, 8)), (25, range(1, 26, 4))])
def test_of_many_layers_some_are_shown_at_even_distances(many: int, shown: range) -> None:
    head, line = cells(foresight_report.layers([recalled("path-table", 0.5, many=many)])[-1])
    assert head[1:] == [f"layer {i}" for i in shown]
    assert line[1:] == [f"{i:.1f}" for i in shown]


def test_b_acc_is_of_the_best_and_of_those_that_papers_compare_with() -> None:
    head, *lines = cells(foresight_report.unions(RECALL)[-1])
    assert head == ["predictor", "batch", "1.00 x", "1.15 x", "all experts"]
    assert [line[:2] for line in lines] == [
        [name, batch] for name in ("`path-table`", "`previous-token`") for batch in ("1", "16")
    ]
    assert lines[1][2:] == ["50.0 / 3.1", "60.0 / 3.8", "100.0 / 6.2"]


def test_what_a_predictor_loses_is_of_means_over_tasks() -> None:
    assert cells(foresight_report.domains(RECALL, LEFT_OUT)[0])[1] == [
        "`path-table`", "60.0 [55.0, 65.0]", "50.0", "45.0", "15.0",
        "50.0 [45.0, 55.0]", "40.0 [35.0, 45.0]",
    ]  # fmt: skip


def test_without_the_run_in_domain_its_columns_are_left_out() -> None:
    head, _ = cells(foresight_report.domains([], LEFT_OUT)[0])
    assert head == ["predictor", "left out: mean", "intent left out", "summary left out"]


def test_a_scenario_without_rows_leaves_its_tables_out() -> None:
    assert set(foresight_report.tables([]).values()) == {""}
    bodies = foresight_report.tables([*REPLAY, *RECALL])
    assert [name for name, body in bodies.items() if not body] == ["domains"]
    for body in filter(None, bodies.values()):
        assert body.count("(A CPU, 2 threads, 8 GiB; commit c0ffee; ") == 1
        assert "scenarios/replay-dsv2lite.toml" in body and "replay-reference" not in body
    assert foresight_report.tables([*RECALL, *LEFT_OUT])["domains"].count("commit c0ffee") == 2


def test_dirty_rows_make_no_table() -> None:
    dirty = [row | {"dirty": True} for row in REPLAY]
    assert set(foresight_report.tables(dirty).values()) == {""}
