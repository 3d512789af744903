"""A session and its process: interrupts, forks, exit."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from sluice import _core

Run = Callable[..., subprocess.CompletedProcess[str]]

pytestmark = pytest.mark.emulated


INTERRUPTED = """
import os, signal, sys, threading
from pathlib import Path
import torch
from small_store import SmallStore

small = SmallStore(num_experts=16, hidden=256, intermediate=256)
store = small.pack(Path(sys.argv[1]))
slow = small.pack(Path(sys.argv[1]), read_rate=2_000_000)  # 12 MB of experts: six seconds
with small.session(slow, "100%") as session:
    call = small.call(64)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell may have ignored it
    threading.Timer(0.7, os.kill, (os.getpid(), signal.SIGINT)).start()
    try:
        session.experts_forward(0, *call)
        print("finished")
    except KeyboardInterrupt as error:
        stats = session.stats()
        early = stats.bytes_read < slow.total_slot_bytes // 2
        print("interrupted", early, stats.stall_s > 0.1 and stats.hits == 0)
    (slots,) = session.residency()
    print("leases", sum(leases for *_, leases in slots))
    small_call = small.call(1)
    out = session.experts_forward(0, *small_call)
    print("right", torch.allclose(out.double(), small.reference(0, *small_call), atol=1e-4))
"""


def test_ctrl_c_during_a_stall_leaves_the_session_usable(run_python: Run, tmp_path: Path) -> None:
    result = run_python(INTERRUPTED, str(tmp_path / "s.pack"))
    assert result.stdout.split("\n")[:3] == ["interrupted True True", "leases 0", "right True"], (
        result.stdout + result.stderr
    )


FORKED = """
import os, sys
from pathlib import Path
import torch
from small_store import SmallStore
from sluice.errors import DeviceError

small = SmallStore()
store = small.pack(Path(sys.argv[1]))
session = small.session(store, "25%")
call = small.call(2)
expected = session.experts_forward(0, *call)
parent = os.getpid()
child = os.fork()
if child == 0:
    for use in (
        lambda: session.experts_forward(0, *call),
        lambda: torch.ops.sluice.experts_forward(session.handle, 0, *call),
        session.stats, session.residency, session.drain, session.plan,
        lambda: session.hint([(0, 0, 1.0, 1.0)]),
    ):
        try:
            use()
        except Exception as error:
            named = f"opened in process {parent}" in str(error) and "make a new one" in str(error)
            told = named or "sluice::experts_forward failed" in str(error)
            print("refused" if told else repr(error))
        else:
            print("worked")
    session.close()
    try:
        fresh = small.session(store, "25%")
    except DeviceError as error:
        print("refused", "forked" in str(error) and "by spawn" in str(error), flush=True)
    else:
        print("new", torch.equal(fresh.experts_forward(0, *call), expected), flush=True)
    if sys.argv[2] == "del":
        del session
    sys.exit(0)  # with the inherited session, and with a new one open
_, status = os.waitpid(child, 0)
print("child", status)
print("parent", torch.equal(session.experts_forward(0, *call), expected))
"""


@pytest.mark.parametrize("end", ["del", "exit"])
def test_a_forked_child_is_told_and_nothing_hangs(
    run_python: Run, tmp_path: Path, end: str
) -> None:
    result = run_python(FORKED, str(tmp_path / "s.pack"), end)
    # CUDA itself works in no child of a process that has used it.
    new = "refused True" if _core.has_slots_apart("cpu") else "new True"
    lines = result.stdout.splitlines()
    assert lines == [*["refused"] * 7, new, "child 0", "parent True"], result.stdout + result.stderr


FORKED_WHILE_BUSY = """
import os, sys, threading
from pathlib import Path
import torch
from small_store import SmallStore

small = SmallStore()
session = small.session(small.pack(Path(sys.argv[1])), "25%")
stop = threading.Event()
def work():
    while not stop.is_set():
        session.experts_forward(0, *small.call(3))
thread = threading.Thread(target=work)
thread.start()
codes = []
for _ in range(20):
    child = os.fork()
    if child == 0:
        try:
            session.stats()
        except Exception:
            os._exit(3)
        os._exit(4)
    codes.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
stop.set()
thread.join()
print(set(codes))
"""


def test_forks_while_another_thread_computes_do_not_hang(run_python: Run, tmp_path: Path) -> None:
    result = run_python(FORKED_WHILE_BUSY, str(tmp_path / "s.pack"))
    assert result.stdout.strip() == "{3}", result.stdout + result.stderr


EXIT_WHILE_READING = """
import sys, threading, time
from pathlib import Path
from small_store import SmallStore

small = SmallStore(num_experts=16, hidden=256, intermediate=256)
small.pack(Path(sys.argv[1]))
session = small.session(small.pack(Path(sys.argv[1]), read_rate=4_000_000), "100%")
if sys.argv[2] == "hint":
    session.hint([(0, expert, 1.0, float("inf")) for expert in range(16)])
else:
    def call():
        session.experts_forward(0, *small.call(2))
    threading.Thread(target=call, daemon=True).start()
time.sleep(0.2)
print("leaving", flush=True)
"""


@pytest.mark.parametrize("what", ["hint", "call"])
def test_the_process_ends_while_a_read_is_in_flight(
    run_python: Run, tmp_path: Path, what: str
) -> None:
    result = run_python(EXIT_WHILE_READING, str(tmp_path / "s.pack"), what)
    assert (result.returncode, result.stdout.strip()) == (0, "leaving"), result.stderr


TRACED = """
from small_store import SmallStore
small = SmallStore()
session = small.session(small.memory_store())
session.experts_forward(0, *small.call(2))
"""


def test_sluice_trace_writes_a_timeline_at_exit(run_python: Run, tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    result = run_python(TRACED, SLUICE_TRACE=str(path))
    assert result.returncode == 0, result.stderr
    assert '"forward' in path.read_text()
