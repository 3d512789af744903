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
from sluice.doctor.checks import version_tuple
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


def test_the_verb_measures_reports_and_leaves_no_probe_behind(tmp_path: Path) -> None:
    done = run("--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["constants"]["memory_bytes_per_s"] > 1e8
    assert found["machine"]["cores"] == len(os.sched_getaffinity(0))
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
