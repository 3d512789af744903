from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path

import pytest
from small_store import SmallStore

from sluice.stats import Stats

HEADER = Path(__file__).parents[2] / "csrc/engine/stats.h"


def test_fields_mirror_the_engines() -> None:
    struct = HEADER.read_text()
    struct = struct[struct.index("struct EngineStats") :]
    core = re.findall(r"^  [\w:<>, ]+ (\w+)(?: = 0)?;", struct, re.MULTILINE)
    mirrored = {re.sub("_ns$", "_s", name) for name in core}
    assert mirrored == {field.name for field in dataclasses.fields(Stats)}


def test_requests_are_hits_and_late_and_misses(small: SmallStore, tmp_path: Path) -> None:
    with small.session(small.pack(tmp_path / "s.pack")) as session:
        for seed in range(20):
            session.experts_forward(seed % 2, *small.call(3, seed=seed))
        stats = session.stats()
    assert stats.requests == stats.hits + stats.late + stats.misses > 0
    assert stats.forwards == 20
    assert stats.tokens == 60
    assert stats.bytes_read == stats.bytes_read_demand > 0
    assert 0 < stats.peak_resident_bytes <= stats.slab_bytes <= stats.budget_bytes


def test_a_difference_counts_what_happened_between(small: SmallStore) -> None:
    with small.session(small.memory_store()) as session:
        session.experts_forward(0, *small.call(2))
        before = session.stats()
        session.experts_forward(0, *small.call(5))
        spent = session.stats() - before
    assert spent.forwards == 1
    assert spent.tokens == 5
    assert spent.requests == spent.hits + spent.late + spent.misses
    assert spent.budget_bytes == before.budget_bytes


def test_a_difference_drops_degradations_that_did_not_grow() -> None:
    earlier = Stats(degradations={"buffered_reads": 2, "waves_at_decode": 1})
    later = Stats(degradations={"buffered_reads": 5, "waves_at_decode": 1})
    assert (later - earlier).degradations == {"buffered_reads": 3}


def test_stats_are_frozen_and_go_into_json() -> None:
    stats = Stats(requests=4, hits=3, misses=1)
    with pytest.raises(dataclasses.FrozenInstanceError):
        stats.hits = 4  # type: ignore[misc]
    assert json.loads(json.dumps(stats.to_dict()))["hit_rate"] == 0.75
    assert Stats().hit_rate == 1.0


def test_a_report_says_budget_slots_hits_bytes_and_source(
    small: SmallStore, tmp_path: Path
) -> None:
    with small.session(small.pack(tmp_path / "s.pack")) as session:
        session.experts_forward(0, *small.call(2))
        session.note("buffered_reads", 3)
        report = session.report()
    for word in ("4 of 16 experts", "% hits", "GB/s", "s.pack", "buffered_reads x 3", "waited"):
        assert word in report
