"""For Python processes that a test on the emulation starts (../plugin.py): they are on it as well.

Such a process gives every byte of the fake device back before it ends, or ends with code 87.
"""

from __future__ import annotations

import atexit
import os
import sys
import traceback

PROCESS = os.getpid()


def _check() -> None:
    """Behind the end of every session: this was registered before the module that ends them."""
    if os.getpid() != PROCESS:  # forked: what the fake runtime holds is the parent's
        return
    left = sys.modules["sluice._core"].emulation_stats()  # type: ignore[attr-defined]
    held = {name: left[name] for name in ("device_bytes", "pinned_bytes", "registered_bytes")}
    if any(held.values()):
        sys.stderr.write(f"the process ends, expected no memory of the device alive, got {held}\n")
        sys.stderr.flush()
        os._exit(87)


try:
    atexit.register(_check)
    from emulation.plugin import choose_schedule, install

    install()
    choose_schedule(os.environ.get("SLUICE_EMULATED_TEST", ""))
except BaseException:  # site.py would go on, and the test on a device that it does not mean
    traceback.print_exc()
    sys.stderr.flush()
    os._exit(86)
