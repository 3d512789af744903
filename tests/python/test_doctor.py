"""doctor reads the machine right, names what is wrong, and removes only what sluice wrote."""

import fcntl
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from sluice import doctor
from sluice.cli import doctor as cli_doctor
from sluice.doctor.checks import version_tuple
from sluice.doctor.device import constants_of
from sluice.memory import cgroup_limit

GIB = 1 << 30


@pytest.fixture
def machine(tmp_path: Path) -> doctor.Machine:
    """A machine without a problem."""
    return replace(
        doctor.look(tmp_path),
        isa="avx2",
        ram_bytes=16 * GIB,
        ram_free_bytes=8 * GIB,
        cgroup_limit_bytes=None,
        huge_pages="madvise",
        file_system="ext4",
        disk_free_bytes=100 * GIB,
        direct_reads=True,
        ops=True,
        versions={"kernel": "6", "torch": "2.13.0", "transformers": "5.24.0"},
        gpu=None,
    )


H200 = doctor.Gpu(
    device="cuda:0",
    count=2,
    name="NVIDIA H200",
    driver="580.65.06",
    pci_address="0000:3b:00.0",
    link_width=16,
    link_width_max=16,
    link_speed_max="32.0 GT/s PCIe",
)


@pytest.fixture(autouse=True)
def own_folders(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SLUICE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("SLUICE_BENCH_DIR", str(tmp_path / "bench"))
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "sluice", "doctor", *arguments],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_a_machine_without_a_problem_has_no_findings(machine: doctor.Machine) -> None:
    assert doctor.examine(machine) == []


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"versions": {"kernel": "6"}}, "transformers-missing"),
        ({"versions": {"transformers": "5.13.0"}}, "transformers-version"),
        ({"versions": {"transformers": "6.0.0"}}, "transformers-version"),
        ({"versions": {"torch": "2.9.1", "transformers": "5.24.0"}}, "torch-version"),
        ({"ops": False}, "ops-missing"),
        ({"file_system": "tmpfs"}, "cache-in-ram"),
        ({"file_system": "fuse.sshfs"}, "cache-remote"),
        ({"direct_reads": False}, "no-direct-reads"),
        ({"disk_free_bytes": GIB}, "little-disk"),
        ({"cgroup_limit_bytes": GIB}, "cgroup-limit"),
        ({"ram_free_bytes": GIB // 2}, "little-ram"),
        ({"huge_pages": "never"}, "huge-pages-off"),
        ({"isa": "scalar"}, "plain-kernels"),
        ({"gpu": replace(H200, link_width=8)}, "narrow-link"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_each_problem_is_named_with_a_line_of_advice(
    machine: doctor.Machine, change: dict, name: str
) -> None:
    (finding,) = doctor.examine(replace(machine, **change))
    assert finding.name == name
    assert finding.advice and "\n" not in finding.advice + finding.found


def test_both_ends_of_the_supported_window_are_inside(machine: doctor.Machine) -> None:
    for version in ("5.13.1", "5.24.0", "5.99.1.dev0"):
        assert not doctor.examine(replace(machine, versions={"transformers": version}))
    assert version_tuple("5.13.1.dev0+cpu") == (5, 13, 1)


def test_problems_come_before_notes(machine: doctor.Machine) -> None:
    broken = replace(machine, huge_pages="never", ops=False, cgroup_limit_bytes=GIB)
    assert [f.severity for f in doctor.examine(broken)] == ["problem", "note", "note"]


def test_the_least_limit_of_all_enclosing_groups_counts(tmp_path: Path) -> None:
    inner = tmp_path / "a" / "b"
    inner.mkdir(parents=True)
    (inner / "memory.max").write_text("max\n")
    (tmp_path / "a" / "memory.max").write_text(f"{3 * GIB}\n")
    membership = tmp_path / "cgroup"
    membership.write_text("0::/a/b\n")
    assert cgroup_limit(membership, tmp_path) == 3 * GIB
    (inner / "memory.max").write_text(f"{GIB}\n")
    assert cgroup_limit(membership, tmp_path) == GIB


def test_the_first_version_of_control_groups_is_read_too(tmp_path: Path) -> None:
    group = tmp_path / "memory" / "job"
    group.mkdir(parents=True)
    (tmp_path / "memory" / "memory.limit_in_bytes").write_text(f"{(1 << 63) - 4096}\n")
    membership = tmp_path / "cgroup"
    membership.write_text("4:cpu,cpuacct:/job\n3:memory:/job\n")
    assert cgroup_limit(membership, tmp_path) is None
    (group / "memory.limit_in_bytes").write_text(f"{GIB}\n")
    assert cgroup_limit(membership, tmp_path) == GIB


def test_without_control_groups_there_is_no_limit(tmp_path: Path) -> None:
    assert cgroup_limit(tmp_path / "none", tmp_path) is None


def test_constants_belong_to_the_machine_they_were_measured_on(tmp_path: Path) -> None:
    constants = doctor.Constants(1e10, {"4x1MiB": 1e9}, 1.0)
    assert doctor.load_constants(tmp_path) is None
    stored = doctor.store_constants(tmp_path, constants)
    assert doctor.load_constants(tmp_path) == constants
    record = json.loads(stored.read_text())
    for name in record["identity"]:
        changed = record | {"identity": record["identity"] | {name: "another"}}
        stored.write_text(json.dumps(changed))
        assert doctor.load_constants(tmp_path) is None, name
    stored.write_text("{")
    assert doctor.load_constants(tmp_path) is None


def found_by_the_core() -> dict:
    """What `_core.measure_device` would find: 50 GB/s, 10 us a copy alone, 2 us queued."""
    sizes = [256 << 10 << step for step in range(9)]
    series = [
        ("to device", "pinned", 1, 10e-6, 50e9),
        ("to device", "pinned", 64, 2e-6, 50e9),
        ("to host", "pinned", 1, 10e-6, 40e9),
        ("to host", "pinned", 64, 2e-6, 40e9),
        ("to device", "pageable", 1, 20e-6, 12e9),
    ]
    return {
        "device": "cuda:0",
        "copies": [
            {
                "direction": direction,
                "memory": memory,
                "depth": depth,
                "bytes": size,
                "seconds": latency_s + size / rate,
            }
            for direction, memory, depth, latency_s, rate in series
            for size in sizes
        ],
        "memory_bytes_per_s": 4.3e12,
        "read_bytes": 4 << 30,
        "launch_s": 3e-6,
        "round_trip_s": 18e-6,
        "pin_bytes_per_s": 3e9,
        "staging_bytes_per_s": 11e9,
        "host_bytes_per_s": 120e9,
        "host_beside_copies_bytes_per_s": 70e9,
        "link_beside_reads_bytes_per_s": 45e9,
    }


def test_the_rate_of_a_link_is_that_of_the_engines_chunk_and_latency_is_fitted() -> None:
    device = constants_of(found_by_the_core(), "cuda:0", "NVIDIA H200")
    chunk = 4 << 20
    assert device.link_bytes_per_s == pytest.approx(chunk / (2e-6 + chunk / 50e9))
    assert device.back_bytes_per_s == pytest.approx(chunk / (2e-6 + chunk / 40e9))
    assert device.pageable_bytes_per_s == pytest.approx(chunk / (20e-6 + chunk / 12e9))
    assert device.link_latency_s == pytest.approx(10e-6)
    assert device.link_queued_latency_s == pytest.approx(2e-6)
    assert device.round_trip_s == 18e-6
    assert next(iter(device.copies_bytes_per_s)) == "to device, pinned, 1 in flight"
    assert list(device.copies_bytes_per_s["to host, pinned, 64 in flight"])[:2] == [
        "256.0 KiB",
        "512.0 KiB",
    ]


def test_a_fit_bears_noise_that_grows_with_the_copy() -> None:
    sizes = [256 << 10 << step for step in range(9)]
    wobble = [1 + 0.01 * (-1) ** step for step in range(9)]
    copies = [(n, w * (10e-6 + n / 25e9)) for n, w in zip(sizes, wobble, strict=True)]
    latency_s, rate = doctor.fit_latency(copies)
    assert latency_s == pytest.approx(10e-6, rel=0.1)
    assert rate == pytest.approx(25e9, rel=0.02)
    # Less than nothing is not a latency: then the rate alone is fitted.
    assert doctor.fit_latency([(n, n / 1e9 - 1e-6) for n in (10_000, 20_000)])[0] == 0.0


def test_constants_of_a_gpu_are_kept_and_belong_to_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    device = constants_of(found_by_the_core(), "cuda:0", "NVIDIA H200")
    constants = doctor.Constants(1e10, {"4x1MiB": 1e9}, 1.0, device)
    monkeypatch.setattr(doctor.machine, "find_gpu", lambda: H200)
    record = json.loads(doctor.store_constants(tmp_path, constants).read_text())
    named = {key: record["identity"][key] for key in ("gpu", "driver", "link_width")}
    assert named == {"gpu": "NVIDIA H200", "driver": "580.65.06", "link_width": 16}
    assert doctor.load_constants(tmp_path) == constants
    for other in (
        None,
        replace(H200, name="NVIDIA A100"),
        replace(H200, driver="590.1"),
        replace(H200, link_width=8),
        replace(H200, link_width=None),
    ):
        monkeypatch.setattr(doctor.machine, "find_gpu", lambda other=other: other)
        assert doctor.load_constants(tmp_path) is None, other


def gpu_files(folder: Path) -> tuple[Path, Path]:
    """What the driver and the kernel show of a GPU at 0000:3b:00.0."""
    driver, devices = folder / "nvidia", folder / "devices"
    for path, text in {
        driver / "gpus/0000:3b:00.0/information": "Model: \t\t NVIDIA H200\nIRQ:   \t 7\n",
        driver / "version": (
            "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.65.06  Release Build\n"
            "GCC version:  gcc version 12.2.0 (Debian 12.2.0-14)\n"
        ),
        devices / "0000:3b:00.0/current_link_width": "8\n",
        devices / "0000:3b:00.0/max_link_width": "16\n",
        devices / "0000:3b:00.0/max_link_speed": "32.0 GT/s PCIe\n",
    }.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return driver, devices


FACTS = {
    "pci_address": "0000:3b:00.0",
    "compute_capability": 90,
    "num_multiprocessors": 132,
    "driver_cuda_version": 13010,
}


def test_a_gpu_is_named_by_its_driver_and_its_link_by_the_kernel(tmp_path: Path) -> None:
    found = doctor.describe_gpu(FACTS, 0, 2, *gpu_files(tmp_path))
    assert found == replace(H200, link_width=8)
    assert found.identity() == {"gpu": "NVIDIA H200", "driver": "580.65.06", "link_width": 8}


def test_what_a_container_hides_of_a_gpu_is_not_guessed(tmp_path: Path) -> None:
    found = doctor.describe_gpu(FACTS, 1, 2, tmp_path / "none", tmp_path / "none")
    assert found == doctor.Gpu(
        device="cuda:1",
        count=2,
        name="compute 9.0, 132 multiprocessors",
        driver="CUDA 13.1",
        pci_address="0000:3b:00.0",
        link_width=None,
        link_width_max=None,
        link_speed_max=None,
    )
    assert found.identity()["link_width"] == "unknown"
    driver, devices = gpu_files(tmp_path)
    (devices / "0000:3b:00.0/current_link_width").write_text("63\n")  # PCI's "unknown"
    (devices / "0000:3b:00.0/max_link_speed").write_text("Unknown\n")
    found = doctor.describe_gpu(FACTS, 0, 1, driver, devices)
    assert found.link_width is None and found.link_speed_max is None


def test_the_report_shows_a_gpu_or_says_that_there_is_none(machine: doctor.Machine) -> None:
    constants = doctor.Constants(1e10, {}, 1.0)
    alone = cli_doctor.text_of(replace(machine, cuda="none"), constants, [])
    assert "no CUDA device (sluice was built without CUDA)" in alone
    hidden = cli_doctor.text_of(replace(machine, cuda="runtime"), constants, [])
    assert "no CUDA device (the driver shows none)" in hidden
    device = constants_of(found_by_the_core(), "cuda:0", "NVIDIA H200")
    text = cli_doctor.text_of(replace(machine, gpu=H200), replace(constants, device=device), [])
    for words in (
        "NVIDIA H200 (cuda:0 of 2), driver 580.65.06, PCIe x16 of x16 at up to 32.0 GT/s PCIe",
        "4300.0 GB/s",
        "48.8 GB/s by 4 MiB from pinned memory; a copy takes 10.0 us more alone, 2.0 us queued",
        "3.0 us, 18.0 us",
        "70.0 GB/s read and 45.0 GB/s copied at once; 120.0 GB/s read alone",
        "to device, pinned, 64 in flight: 256.0 KiB 36.2",
    ):
        assert words in text, words
    unread = replace(H200, link_width=None)
    assert "PCIe lanes not readable" in cli_doctor.text_of(
        replace(machine, gpu=unread), constants, []
    )


def test_the_verb_measures_reports_and_leaves_no_probe_behind(tmp_path: Path) -> None:
    done = run("--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["constants"]["memory_bytes_per_s"] > 1e8
    assert found["machine"]["cores"] == len(os.sched_getaffinity(0))
    assert (found["constants"]["device"] is None) == (found["machine"]["gpu"] is None)
    if found["machine"]["direct_reads"]:
        assert set(found["constants"]["disk_bytes_per_s"]) == {
            "1x1MiB", "1x4MiB", "4x1MiB", "4x4MiB",
        }  # fmt: skip
    assert [path.name for path in (tmp_path / "cache").iterdir()] == ["doctor.json"]


def written(folder: Path) -> dict[str, Path]:
    """One file of each kind that sluice writes, and two that it does not."""
    cache, bench = folder / "cache", folder / "bench"
    checkpoint = bench / "mixtral-0123456789abcdef"
    for made in (cache, checkpoint, bench / "mine"):
        made.mkdir(parents=True)
    files = {
        "pack": cache / "mixtral-1a2b.sluice.safetensors",
        "partial": cache / "olmoe-3c4d.sluice.safetensors.partial",
        "journal": cache / "olmoe-3c4d.sluice.safetensors.journal",
        "constants": cache / "doctor.json",
        "checkpoint": checkpoint / "config.json",
        "thesis": cache / "thesis.tex",
        "weights": cache / "model.safetensors",
        "mine": bench / "mine" / "config.json",
    }
    for path in files.values():
        path.write_bytes(b"x" * 100)
    return files


def test_cleaning_asks_first_and_without_an_answer_removes_nothing(tmp_path: Path) -> None:
    files = written(tmp_path)
    done = run("--clean")
    assert done.returncode == 0 and "nothing removed" in done.stdout
    assert files["pack"].name in done.stdout and "thesis" not in done.stdout
    assert all(path.exists() for path in files.values())


def test_cleaning_removes_what_sluice_wrote_and_nothing_else(tmp_path: Path) -> None:
    files = written(tmp_path)
    (tmp_path / "cache" / "elsewhere.sluice.safetensors").symlink_to(files["thesis"])
    done = run("--clean", "--yes", "--json")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert len(result["removed"]) == len(result["files"]) == 5
    left = {name for name, path in files.items() if path.exists()}
    assert left == {"thesis", "weights", "mine"}
    assert (tmp_path / "cache" / "elsewhere.sluice.safetensors").is_symlink()
    assert "nothing" in run("--clean").stdout


def test_a_pack_that_is_being_written_is_kept(tmp_path: Path) -> None:
    files = written(tmp_path)
    with files["partial"].open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        removed = {entry.path.name for entry in doctor.remove(doctor.written_files())}
    assert files["partial"].exists() and files["journal"].exists()
    assert files["pack"].name in removed and not files["pack"].exists()
    doctor.remove(doctor.written_files())
    assert not files["partial"].exists() and not files["journal"].exists()


def test_experts_spilled_by_a_running_process_are_kept(tmp_path: Path) -> None:
    written(tmp_path)
    gone = subprocess.Popen(["true"])
    gone.wait()
    paths = {
        pid: tmp_path / "cache" / f"spill-{pid}-0.sluice.safetensors"
        for pid in (os.getpid(), gone.pid)
    }
    for path in paths.values():
        path.write_bytes(b"x")
    doctor.remove(doctor.written_files())
    assert paths[os.getpid()].exists() and not paths[gone.pid].exists()


def test_a_file_that_is_no_pack_is_refused(tmp_path: Path) -> None:
    (tmp_path / "pack").write_bytes(b"not a pack")
    done = run(str(tmp_path / "pack"))
    assert done.returncode == 1 and "CheckpointError" in done.stderr
    assert "expected the pack alone" in run(str(tmp_path / "pack"), "--full").stderr
