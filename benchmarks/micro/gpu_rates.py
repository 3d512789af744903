"""What doctor measures of a GPU, as rows: the copy engine's table, memory, launches, pinning."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from harness import row
from sluice import doctor
from sluice.doctor.device import measure_device

# Of DeviceConstants: what is a rate, and what is a time.
_RATES = ("memory_bytes_per_s", "link_bytes_per_s", "back_bytes_per_s", "pageable_bytes_per_s",
          "pin_bytes_per_s", "staging_bytes_per_s", "host_bytes_per_s",
          "host_beside_copies_bytes_per_s", "link_beside_reads_bytes_per_s")  # fmt: skip
_TIMES = ("link_latency_s", "link_queued_latency_s", "launch_s", "round_trip_s")


def run(scenario: dict[str, Any]) -> list[dict[str, Any]]:
    work = scenario["workload"]
    found = doctor.find_gpu()
    name = found.name if found is not None else "emulated"
    runs = [
        measure_device("cuda:0", name, full=work["full"])
        for _ in range(scenario["stop"]["max_samples"])
    ]
    rows = [one(scenario, key, "B/s", [getattr(r, key) for r in runs]) for key in _RATES]
    rows += [one(scenario, key, "s", [getattr(r, key) for r in runs]) for key in _TIMES]
    for series, sizes in asdict(runs[0])["copies_bytes_per_s"].items():
        for size in sizes:
            samples = [r.copies_bytes_per_s[series][size] for r in runs]
            rows.append(one(scenario, f"copies of {size}", "B/s", samples, mode=series))
    return rows


def one(
    scenario: dict[str, Any], metric: str, unit: str, samples: list[float], mode: str = "doctor"
) -> dict[str, Any]:
    return row(
        scenario,
        mode=mode,
        metric=metric,
        unit=unit,
        better="higher" if unit == "B/s" else "lower",
        state="resident",
        samples=samples,
        stop="max",
        correct="bitwise (copies are compared in the tests)",
        config={
            "probe": "sluice.doctor, full" if scenario["workload"]["full"] else "sluice.doctor"
        },
        data={"device": "cuda:0"},
    )
