"""A progress bar for work that takes longer than a second, and nothing for work that does not."""

from __future__ import annotations

import os
import sys
import time
from types import TracebackType
from typing import TextIO

from sluice.text import format_bytes

_SHOW_AFTER_S = 1.0
_REDRAW_EVERY_S = 0.1
_WIDTH = 30


class Progress:
    """One bar on stderr: `progress(done, total)` as often as one likes.

    Silent for the first second, when the stream is no terminal, and under
    `HF_HUB_DISABLE_PROGRESS_BARS`. Leaving the `with` block wipes the bar, so that what is printed
    next starts on a clean line.

    Args:
        label: What is going on, in two or three words.
        unit: "bytes", or what the counts count ("experts", "tasks").
        stream: Where to draw; stderr unless a test asks for another.
    """

    def __init__(self, label: str, *, unit: str = "bytes", stream: TextIO | None = None) -> None:
        self._label = label
        self._unit = unit
        self._stream = stream or sys.stderr
        self._begin_s = time.monotonic()
        self._drawn_s = 0.0
        self._drawn_columns = 0
        self.enabled = self._stream.isatty() and not bars_disabled()

    def __call__(self, done: int, total: int) -> None:
        """Shows that `done` of `total` are finished."""
        now_s = time.monotonic()
        if not self.enabled or now_s - self._begin_s < _SHOW_AFTER_S:
            return
        if now_s - self._drawn_s < _REDRAW_EVERY_S and done < total:
            return
        self._drawn_s = now_s
        line = self.line(done, total, now_s - self._begin_s)
        self._stream.write("\r" + line.ljust(self._drawn_columns))
        self._stream.flush()
        self._drawn_columns = len(line)

    def line(self, done: int, total: int, elapsed_s: float) -> str:
        """The bar as text."""
        share = min(1.0, done / total) if total > 0 else 1.0
        filled = int(share * _WIDTH)
        bar = "#" * filled + "-" * (_WIDTH - filled)
        if self._unit == "bytes":
            counts = f"{format_bytes(done)} of {format_bytes(total)}"
            rate = f"{format_bytes(int(done / elapsed_s))}/s" if elapsed_s > 0 else ""
        else:
            counts = f"{done} of {total} {self._unit}"
            rate = ""
        left_s = elapsed_s * (1 - share) / share if share > 0 else 0.0
        tail = ", ".join(part for part in (rate, f"{left_s:.0f} s left") if part)
        return f"{self._label} [{bar}] {share:4.0%} {counts}, {tail}"

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._drawn_columns:
            self._stream.write("\r" + " " * self._drawn_columns + "\r")
            self._stream.flush()
            self._drawn_columns = 0


def bars_disabled() -> bool:
    """Whether `HF_HUB_DISABLE_PROGRESS_BARS` asks for silence."""
    value = os.environ.get("HF_HUB_DISABLE_PROGRESS_BARS", "")
    return value.strip().upper() in {"1", "ON", "YES", "TRUE"}
