"""doctor, plan and generate beside a GPU, on the emulated device.

Its figures mean nothing: structure, bytes, signs, and that everything is given back. Each command
runs in a process of its own, with the module that SLUICE_EMULATED_CORE names.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from sluice.reference import reference_model

PROMPT = "<|bos|>What does the user want? i need this song on my meditation playlist<|sep|>"

pytestmark = pytest.mark.skipif(
    "SLUICE_EMULATED_CORE" not in os.environ,
    reason="SLUICE_EMULATED_CORE names no _core*.so built with SLUICE_EMULATION",
)

# In a process of its own, on the emulation as this one (plugin.py).
DRIVER = """
import json, sys
from sluice import _core
from sluice.cli import main
code = main(sys.argv[1:])
sys.stderr.write("\\n" + json.dumps(_core.emulation_stats()))
sys.exit(code)
"""


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


def run(cache: Path, *arguments: str) -> tuple[str, dict[str, int]]:
    """The command's output, and what the fake runtime holds behind it."""
    done = subprocess.run(
        [sys.executable, "-c", DRIVER, *arguments],
        env=os.environ | {"SLUICE_CACHE": str(cache), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=250,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout, json.loads(done.stderr.splitlines()[-1])


@pytest.fixture(scope="module")
def measured(cache: Path) -> tuple[dict[str, Any], dict[str, int]]:
    """What `sluice doctor` found; its constants are kept in the cache."""
    text, left = run(cache, "doctor", "--json")
    return json.loads(text), left


def test_doctor_measures_the_device_and_gives_everything_back(
    measured: tuple[dict[str, Any], dict[str, int]], cache: Path
) -> None:
    found, left = measured
    device = found["constants"]["device"]
    assert (device["name"], device["device"]) == ("emulated", "cuda:0")
    rates = {key: value for key, value in device.items() if key.endswith(("_bytes_per_s", "_s"))}
    copies = rates.pop("copies_bytes_per_s")
    latencies = [rates.pop(key) for key in ("link_latency_s", "link_queued_latency_s")]
    assert all(latency_s >= 0 for latency_s in latencies)
    assert len(rates) == 11 and all(rate > 0 for rate in rates.values()), rates
    assert list(copies) == [
        "to device, pinned, 1 in flight",
        "to device, pinned, 2 in flight",
        "to host, pinned, 1 in flight",
        "to host, pinned, 2 in flight",
        "to device, pageable, 1 in flight",
    ]
    for series in copies.values():
        assert list(series) == ["64.0 KiB", "128.0 KiB", "256.0 KiB"]
        assert all(rate > 0 for rate in series.values())
    assert found["machine"]["gpu"]["name"] == "emulated"
    assert found["machine"]["gpu"]["link_width"] is None
    identity = json.loads((cache / "doctor.json").read_text())["identity"]
    assert (identity["gpu"], identity["link_width"]) == ("emulated", "unknown")
    assert left["launches"] > 200 and left["pageable_copies"] > 0
    # What was read was there: slab and sums at least, beside the copies' own slab.
    assert left["peak_device_bytes"] >= 2 * (256 << 10)
    for held in ("device_bytes", "pinned_bytes", "registered_bytes", "streams", "events", "queued"):
        assert left[held] == 0, held


def test_plan_takes_the_measured_device(
    measured: tuple[dict[str, Any], dict[str, int]], cache: Path
) -> None:
    text, _ = run(cache, "plan", str(reference_model()), "--device-memory", "25%", "--json")
    (machine,) = json.loads(text)["predictions"]
    device = measured[0]["constants"]["device"]
    assert not machine["assumed"] and machine["rates"]["name"] == "doctor, emulated"
    assert machine["rates"]["link_bytes_per_s"] == device["link_bytes_per_s"]
    assert machine["rates"]["memory_bytes_per_s"] == device["memory_bytes_per_s"]
    (budget,) = machine["budgets"]
    assert budget["missed_bytes_per_token"] == 8 * 4 * 73728 * 3 // 4
    assert budget["terms"]["h2d_s"] == pytest.approx(
        budget["missed_bytes_per_token"] / device["link_bytes_per_s"]
    )


def test_a_generation_beside_a_gpu_says_what_binds_it(
    measured: tuple[dict[str, Any], dict[str, int]], cache: Path
) -> None:
    model = str(reference_model())
    common = ("generate", model, "--prompt", PROMPT, "--device-memory", "25%")
    text, _ = run(cache, *common, "--max-new-tokens", "8", "--json")
    found = json.loads(text)
    decode, device = found["decode"], measured[0]["constants"]["device"]
    assert found["text"] == "update playlist"
    steps = found["new_tokens"] - 1
    # What came over the link and was asked for: some of it by the prompt's guesses, which may have
    # come before decode began.
    needed = decode["h2d_s"] * device["link_bytes_per_s"] / 73728
    assert needed == pytest.approx(round(needed)), "whole experts"
    assert 0 < round(needed) <= steps * 32
    assert decode["experts_s"] == pytest.approx(steps * 32 * 73728 / device["memory_bytes_per_s"])
    assert decode["limit_s"] == pytest.approx(
        decode["dense_s"] + max(decode["experts_s"], decode["h2d_s"], decode["disk_s"])
    )
    assert decode["achieved"] == pytest.approx(decode["limit_s"] / decode["seconds"])
    assert decode["hand_offs"] == steps * 8
    assert decode["hand_off_s"] == device["round_trip_s"]
    assert decode["constants"] == "doctor, emulated"
    assert decode["unexplained_s"] == pytest.approx(
        decode["seconds"] - decode["limit_s"] - decode["overhead_s"] - decode["wasted_hints_s"]
    )
    terms = {name: decode[f"{name}_s"] for name in ("h2d", "disk", "experts", "dense")}
    assert decode["bound"] == max(terms, key=lambda name: terms[name])
    text, _ = run(cache, *common, "--max-new-tokens", "8")
    assert f"decode {steps} tok" in text and "achieved" in text and "bound: " in text
    assert "8 hand-offs x" in text and "constants: doctor, emulated" in text
