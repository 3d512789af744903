"""What the emulation copies of the CUDA runtime, asked of the runtime that is there.

Each fact runs in a process of its own: one of them loses the device, and a wrong one may hang.
"""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import pytest

FACTS = (
    "a_wait_for_an_event_that_was_never_recorded_is_none",
    "a_wait_keeps_the_record_that_the_event_had_at_the_call",
    "an_event_holds_back_another_stream",
    "pageable_memory_is_read_at_the_call",
    "pageable_memory_is_written_when_the_call_returns",
    "pinned_memory_is_read_late",
    "registered_pages_are_pinned",
    "freeing_waits_for_the_device",
    "an_unfinished_event_is_not_ready_and_that_is_no_loss",
    "bad_shapes_are_refused_at_the_call_and_forgotten",
    "shared_memory_is_granted_when_asked_for",
    "the_default_stream_orders_blocking_streams_and_no_others",
    "a_replay_reads_what_its_addresses_hold_then",
    "the_default_stream_cannot_be_captured",
    "waiting_and_allocating_end_a_capture",
    "a_destroyed_stream_finishes_its_work",
    "a_refused_allocation_is_no_loss",
    "a_fault_is_told_by_the_next_call_that_waits_and_stays",
)
CHILD = """
import ctypes, sys
library = ctypes.CDLL(sys.argv[1])
library.semantics_run.restype = ctypes.c_char_p
for policy in range(int(sys.argv[3])):
    said = library.semantics_run(sys.argv[2].encode(), policy)
    if said is not None:
        sys.exit(f"policy {policy}: " + said.decode())
print("holds")
"""


def test_every_fact_is_asked(library: Any) -> None:
    assert set(library.semantics_facts().decode().split()) == set(FACTS)


@pytest.mark.parametrize("fact", FACTS)
def test_the_runtime_does_as_the_emulation_says(library: Any, fact: str) -> None:
    policies = 4 if library.semantics_runtime() == b"emulated" else 1
    command = [sys.executable, "-c", CHILD, os.environ["SLUICE_GPU_TESTS"], fact, str(policies)]
    run = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert run.returncode == 0, f"{fact}: {run.stderr[-2000:]}"
    assert run.stdout == "holds\n"
