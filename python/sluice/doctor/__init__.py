"""What this machine can do, what stands in sluice's way, and what sluice has written on it."""

from sluice.doctor.checks import Finding, examine
from sluice.doctor.device import DeviceConstants, fit_latency, measure_device
from sluice.doctor.files import WrittenFile, folders, remove, written_files
from sluice.doctor.gpu import Gpu, describe_gpu, find_gpu
from sluice.doctor.machine import Machine, look
from sluice.doctor.measure import Constants, load_constants, measure, store_constants

__all__ = [
    "Constants",
    "DeviceConstants",
    "Finding",
    "Gpu",
    "Machine",
    "WrittenFile",
    "describe_gpu",
    "examine",
    "find_gpu",
    "fit_latency",
    "folders",
    "load_constants",
    "look",
    "measure",
    "measure_device",
    "remove",
    "store_constants",
    "written_files",
]
