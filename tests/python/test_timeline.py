from __future__ import annotations

import json
from pathlib import Path

import pytest
from small_store import SmallStore

from sluice.errors import ConfigError
from sluice.timeline import Span, chrome_trace, nvtx_wanted


def complete_events(trace: dict) -> list[dict]:
    return [event for event in trace["traceEvents"] if event["ph"] == "X"]


def test_a_run_becomes_rows_for_the_caller_and_the_disk(small: SmallStore, tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    with small.session(small.pack(tmp_path / "s.pack")) as session:
        session.experts_forward(1, *small.call(6))
        session.timeline(path)
    trace = json.loads(path.read_text())
    rows = {e["args"]["name"] for e in trace["traceEvents"] if e.get("name") == "thread_name"}
    assert {"caller", "load 0"} <= rows
    kinds = {event["cat"] for event in complete_events(trace)}
    assert {"forward", "compute", "load_demand"} <= kinds
    load = next(event for event in complete_events(trace) if event["cat"] == "load_demand")
    assert load["name"].startswith("load demand layer 1 expert ")
    assert load["args"]["bytes"] > 0
    assert load["args"]["module"] == "layers.1.experts"
    assert all(event["dur"] >= 0 and event["ts"] >= 0 for event in complete_events(trace))
    assert list(tmp_path.glob("*.tmp")) == []


def test_reads_that_overlap_get_rows_of_their_own() -> None:
    spans: list[Span] = [
        ("load_demand", 0.0, 2.0, 0, 0, 8, 0),
        ("load_hint", 1.0, 3.0, 0, 1, 8, 0),
        ("load_demand", 2.0, 4.0, 0, 2, 8, 0),
    ]
    rows = [event["tid"] for event in complete_events(chrome_trace(spans))]
    assert rows == [1, 2, 1]


def test_an_empty_timeline_is_a_legal_trace() -> None:
    assert complete_events(chrome_trace([])) == []


def test_without_the_timeline_nothing_is_recorded(small: SmallStore, tmp_path: Path) -> None:
    with small.session(small.memory_store(), timeline=False) as session:
        session.experts_forward(0, *small.call(2))
        session.timeline(tmp_path / "run.json")
    assert complete_events(json.loads((tmp_path / "run.json").read_text())) == []


@pytest.mark.parametrize(
    ("value", "wanted"), [(None, False), ("", False), ("0", False), ("1", True)]
)
def test_sluice_nvtx_is_one_or_nothing(
    value: str | None, wanted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("SLUICE_NVTX", raising=False)
    if value is not None:
        monkeypatch.setenv("SLUICE_NVTX", value)
    assert nvtx_wanted() is wanted


def test_another_sluice_nvtx_is_refused_when_a_session_opens(
    small: SmallStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLUICE_NVTX", "yes")
    with pytest.raises(ConfigError, match="SLUICE_NVTX: got 'yes', expected 1, or 0 or nothing"):
        small.session(small.memory_store())
