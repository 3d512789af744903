"""NVTX ranges: those of the timeline, by the same names, heard by a listener of NVTX (nvtx/).

SLUICE_NVTX_RECORDER names the listener's library; a build without NVTX's headers has none.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
RECORDER = os.environ.get("SLUICE_NVTX_RECORDER", "")

pytestmark = pytest.mark.skipif(
    "SLUICE_EMULATED_CORE" not in os.environ,
    reason="SLUICE_EMULATED_CORE names no _core*.so built with SLUICE_EMULATION",
)

SCRIPT = """
import json, sys
from pathlib import Path
sys.path.append(sys.argv[1])
from small_store import SmallStore
from sluice.timeline import chrome_trace

small = SmallStore()
small.pack(Path(sys.argv[2]))
slow = small.pack(Path(sys.argv[2]), read_rate=4_000_000)  # an expert takes 18 ms: calls wait
with small.session(slow, "25%") as session:
    for tokens in (1, 9):
        for layer in (0, 1):
            session.experts_forward(layer, *small.call(tokens))
    session.hint([(0, expert, 1.0, float("inf")) for expert in range(8)])
    session.experts_forward(1, *small.call(2))
    session.drain()
    trace = chrome_trace(session.spans())
libraries = [line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines()]
print(json.dumps({
    "names": [event["name"] for event in trace["traceEvents"] if event["ph"] == "X"],
    "listens": sys.argv[3] in libraries,
}))
"""


def run(tmp_path: Path, **environment: str) -> tuple[subprocess.CompletedProcess[str], list[str]]:
    """A few forwards in a process with the listener at hand; and the lines it wrote."""
    log = tmp_path / "nvtx.log"
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(ROOT / "tests" / "python"), str(tmp_path / "s.pack"),
         RECORDER],
        env=os.environ
        | {"NVTX_INJECTION64_PATH": RECORDER, "SLUICE_NVTX_LOG": str(log), "OMP_NUM_THREADS": "1"}
        | environment,
        capture_output=True,
        text=True,
        timeout=100,
    )  # fmt: skip
    return done, log.read_text().splitlines() if log.exists() else []


def result(done: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_the_timelines_spans_are_shown_by_name_nested_and_balanced(tmp_path: Path) -> None:
    if not RECORDER:
        done, _ = run(tmp_path, SLUICE_NVTX="1")
        assert "ConfigError: SLUICE_NVTX: got 1 in a build without NVTX" in done.stderr
        return
    done, lines = run(tmp_path, SLUICE_NVTX="1")
    found = result(done)
    assert found["listens"]
    assert lines[:2] == ["loaded", "domain sluice"]
    names: list[str] = []
    stacks: dict[str, list[str]] = {}
    loading: dict[str, str] = {}
    for line in lines[2:]:
        what, where, *name = line.split(" ", 2)
        names += name
        stack = stacks.setdefault(where, []) if what in ("push", "pop") else []
        if what == "push":
            inside = stack[-1] if stack else "nothing"
            kind, _, layer = name[0].partition(" layer ")
            outer = "nothing" if kind == "forward" else f"forward layer {layer.split()[0]}"
            assert inside == outer, f"{name[0]}: got it inside {inside}, expected {outer}"
            stack.append(name[0])
        elif what == "pop":
            stack.pop()
        elif what == "start":
            loading[where] = name[0]
        else:
            assert what == "end", line
            assert loading.pop(where).startswith("load ")
    assert not any(stacks.values()) and not loading, "every range ends"
    assert Counter(names) == Counter(found["names"]), "each span of the timeline, and no other"
    kinds = {name.split(" layer ")[0] for name in names}
    assert kinds == {"forward", "compute", "stall", "combine", "load demand", "load hint"}
    assert "load demand layer 0 expert" in " ".join(names)


def test_unasked_nothing_is_loaded(tmp_path: Path) -> None:
    done, lines = run(tmp_path, SLUICE_NVTX="")
    found = result(done)
    assert len(found["names"]) > 10
    assert not found["listens"] and lines == []


def test_without_a_profiler_a_warning_says_so(tmp_path: Path) -> None:
    if not RECORDER:
        pytest.skip("a build without NVTX refuses it: the first test")
    done, lines = run(tmp_path, SLUICE_NVTX="1", NVTX_INJECTION64_PATH="", SLUICE_LOG="warning")
    result(done)
    assert lines == []
    assert "SLUICE_NVTX: got no profiler in this process" in done.stderr
