"""How sessions end: closed, dropped, at Python's end; and what a forked child leaves alone."""

from __future__ import annotations

import atexit
import os
import time
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sluice import _core, log
from sluice.errors import SluiceError
from sluice.timeline import write_chrome_trace

_LEAVING_S = 5.0

open_sessions: weakref.WeakSet[Any] = weakref.WeakSet()
"""Those that `_leave` ends."""

inside: set[tuple[int, int]] = set()
"""(thread, session) of calls that wait in the core."""
os.register_at_fork(after_in_child=inside.clear)  # those threads are not in the child


@atexit.register
def _leave() -> None:
    """Ends what is open, then lets daemon threads come out of the core before Python ends.

    A thread that takes the GIL again after that is ended where it stands, and C++ frames that it
    stands in end the process with it.
    """
    for session in list(open_sessions):
        try:
            # Not close: nobody needs his weights back any more.
            session._end()  # pyright: ignore[reportPrivateUsage]
        except SluiceError as error:
            log.LOGGER.error("%r: %s", session, error)
    deadline = time.monotonic() + _LEAVING_S
    while inside and time.monotonic() < deadline:
        time.sleep(0.001)


def end_core(core: _core.Session, layer_names: Sequence[str], opened_in: int) -> None:
    """Closes the core, and writes SLUICE_TRACE's timeline; at exit and when dropped, too."""
    if os.getpid() != opened_in:  # a forked child: not its session, nor its locks
        return
    path = os.environ.get("SLUICE_TRACE")
    if path:
        target = Path(path)
        if core.handle > 1:  # one file per session
            target = target.with_name(f"{target.stem}.{core.handle}{target.suffix}")
        try:
            write_chrome_trace(target, core.timeline(), layer_names)
        except OSError as error:
            log.LOGGER.error("SLUICE_TRACE: cannot write %s: %s", target, error)
    core.close()
    log.pull()
