"""The names of figures in rows on foresight: as committed rows spell them, there and back."""

from pathlib import Path

import pytest

import result_tables
from foresight_keys import Place, UnionKey, precision_key, recall_depths, recall_key

RESULTS = Path(__file__).resolve().parents[2] / "benchmarks" / "results"


@pytest.mark.parametrize(
    ("mode", "what"),
    [
        ("mix: lru", Place("mix", 1, "lru")),
        ("mix: edge:printed", Place("mix", 1, "edge:printed")),
        ("balanced, batch 16: belady", Place("balanced", 16, "belady")),
    ],
)
def test_a_mode_names_stream_batch_and_contender(mode: str, what: Place) -> None:
    assert Place.parse(mode) == what
    assert str(what) == mode


@pytest.mark.parametrize(
    ("key", "what"),
    [
        ("token: batch 16, 1.15 x the true set: b_acc", UnionKey("token", 16, "1.15", "b_acc")),
        ("1: batch 1, all x the true set: precision", UnionKey("1", 1, "all", "precision")),
        ("1: recall@6", None),
    ],
)
def test_a_key_of_a_union_names_horizon_batch_size_and_figure(
    key: str, what: UnionKey | None
) -> None:
    assert UnionKey.parse(key) == what
    assert what is None or str(what) == key


def test_keys_of_recall_name_horizon_and_depth() -> None:
    assert recall_key("token", 6) == "token: recall@6"
    assert recall_key(1, 6, "worst task") == "1: recall@6 worst task"
    assert precision_key(1, 12) == "1: precision@12"
    keys = [recall_key(1, 12), recall_key(1, 6), recall_key(1, 7, "low"), recall_key(2, 9)]
    assert recall_depths(keys, 1) == [6, 12]


def test_committed_rows_are_read_as_they_are_written() -> None:
    rows = [r for r in result_tables.all_rows(RESULTS) if r["state"] == "replay"]
    gaps = [row["mode"] for row in rows if row["metric"] == "gap_closed"]
    assert gaps and [str(Place.parse(mode)) for mode in gaps] == gaps
    for row in (row for row in rows if row["metric"] == "recall_at_k"):
        unions = [key for key in row["derived"] if " x the true set" in key]
        assert unions and [str(UnionKey.parse(key)) for key in unions] == unions
        for horizon in row["config"]["workload"]["horizons"]:
            assert len(recall_depths(row["derived"], horizon)) == 4
