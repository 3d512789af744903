"""A session's spans as a Chrome trace, for Perfetto or chrome://tracing."""

from __future__ import annotations

import heapq
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from sluice.errors import ConfigError

Span = tuple[str, float, float, int, int, int, int]
"""(kind, begin_s, end_s, layer, expert, bytes, tokens) of `_core.Session.timeline`."""

_LOADS = ("load_demand", "load_hint")
_CALLER = 0
_FIRST_READ_ROW = 1


def chrome_trace(spans: Sequence[Span], layer_names: Sequence[str] = ()) -> dict[str, Any]:
    """The trace as a dict: one row for the caller, as many for reads as ever overlapped.

    Args:
        spans: As the core gives them.
        layer_names: Module paths, shown with each span.
    """
    origin = min((span[1] for span in spans), default=0.0)
    loads = sorted((span for span in spans if span[0] in _LOADS), key=lambda span: span[1])
    calls = [span for span in spans if span[0] not in _LOADS]
    rows = [*((_CALLER, span) for span in calls), *_in_rows(loads)]
    names = {_CALLER: "caller"}
    names |= {row: f"load {row - _FIRST_READ_ROW}" for row, _ in rows if row != _CALLER}
    events = [*_row_names(names), *(_event(row, s, origin, layer_names) for row, s in rows)]
    return {"traceEvents": events, "displayTimeUnit": "ms"}


def nvtx_wanted() -> bool:
    """Whether SLUICE_NVTX asks for the same spans as NVTX ranges, for Nsight Systems.

    Read when a session opens; a build without NVTX refuses to open one. Off, they cost a branch
    each.

    Raises:
        ConfigError: SLUICE_NVTX is neither 0 nor 1.
    """
    wanted = os.environ.get("SLUICE_NVTX", "0")
    if wanted not in ("", "0", "1"):
        raise ConfigError(f"SLUICE_NVTX: got {wanted!r}, expected 1, or 0 or nothing")
    return wanted == "1"


def write_chrome_trace(
    path: str | os.PathLike[str], spans: Sequence[Span], layer_names: Sequence[str] = ()
) -> None:
    """Writes `chrome_trace` to a file, whole or not at all."""
    target = Path(path)
    partial = target.with_name(f"{target.name}.{os.getpid()}.tmp")
    partial.write_text(json.dumps(chrome_trace(spans, layer_names)))
    partial.replace(target)


def _in_rows(loads: Iterable[Span]) -> Iterator[tuple[int, Span]]:
    """Gives each load the lowest row that is free when it begins: a row never overlaps itself."""
    free: list[int] = []
    busy: list[tuple[float, int]] = []
    rows = 0
    for span in loads:
        while busy and busy[0][0] <= span[1]:
            heapq.heappush(free, heapq.heappop(busy)[1])
        if free:
            row = heapq.heappop(free)
        else:
            row, rows = rows, rows + 1
        heapq.heappush(busy, (span[2], row))
        yield _FIRST_READ_ROW + row, span


def _row_names(names: dict[int, str]) -> Iterator[dict[str, Any]]:
    yield {"ph": "M", "pid": 1, "name": "process_name", "args": {"name": "sluice"}}
    for row, name in sorted(names.items()):
        yield {"ph": "M", "pid": 1, "tid": row, "name": "thread_name", "args": {"name": name}}
        yield {
            "ph": "M",
            "pid": 1,
            "tid": row,
            "name": "thread_sort_index",
            "args": {"sort_index": row},
        }


def _event(row: int, span: Span, origin: float, layer_names: Sequence[str]) -> dict[str, Any]:
    kind, begin, end, layer, expert, num_bytes, tokens = span
    args: dict[str, Any] = {"layer": layer}
    if 0 <= layer < len(layer_names):
        args["module"] = layer_names[layer]
    if expert >= 0:
        args["expert"] = expert
    if num_bytes:
        args["bytes"] = num_bytes
    if tokens:
        args["tokens"] = tokens
    where = f"layer {layer}" + (f" expert {expert}" if expert >= 0 else "")
    return {
        "ph": "X",
        "pid": 1,
        "tid": row,
        "cat": kind,
        "name": f"{kind.replace('_', ' ')} {where}",
        "ts": (begin - origin) * 1e6,
        "dur": max(end - begin, 0.0) * 1e6,
        "args": args,
    }
