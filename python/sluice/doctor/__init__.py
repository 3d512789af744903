"""What this machine can do, what stands in sluice's way, and what sluice has written on it."""

from sluice.doctor.checks import Finding, examine
from sluice.doctor.files import WrittenFile, folders, remove, written_files
from sluice.doctor.machine import Machine, look
from sluice.doctor.measure import Constants, load_constants, measure, store_constants

__all__ = [
    "Constants",
    "Finding",
    "Machine",
    "WrittenFile",
    "examine",
    "folders",
    "load_constants",
    "look",
    "measure",
    "remove",
    "store_constants",
    "written_files",
]
