"""Routing traces: recorded, kept, imported, split."""

from sluice.trace.files import SUFFIX, load, save
from sluice.trace.imports import from_arrays, import_esft_folder
from sluice.trace.recorder import Recorder, record
from sluice.trace.responses import import_sglang, import_vllm, read_responses
from sluice.trace.split import Split, check_disjoint, leave_out, split_by_sequence
from sluice.trace.trace import UNKNOWN, Trace, TraceSequence, concatenate, content_hash

__all__ = [
    "SUFFIX",
    "UNKNOWN",
    "Recorder",
    "Split",
    "Trace",
    "TraceSequence",
    "check_disjoint",
    "concatenate",
    "content_hash",
    "from_arrays",
    "import_esft_folder",
    "import_sglang",
    "import_vllm",
    "leave_out",
    "load",
    "read_responses",
    "record",
    "save",
    "split_by_sequence",
]
