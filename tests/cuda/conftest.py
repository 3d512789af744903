"""nvcc's view of the kernels: every .cu compiled for two architectures, once per session."""

import os
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
ARCHITECTURES = ("80", "90a")
# What kernels/CMakeLists.txt gives them; test_kernels.py compares.
FLAGS = ("-std=c++20", "-O3", "-fmad=false")


@dataclass(frozen=True)
class Kernel:
    """One entry of one .cu for one architecture."""

    source: str
    architecture: str
    name: str  # demangled
    registers: int
    spill_bytes: int
    shared_bytes: int
    ptx: str

    def count(self, text: str) -> int:
        return self.ptx.count(text)


def nvcc() -> str:
    found = shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")
    if found is None:
        if os.environ.get("SLUICE_CUDA") == "ON":
            pytest.fail("SLUICE_CUDA=ON: no nvcc found; install a CUDA toolkit")
        pytest.skip("no nvcc: what it makes of the kernels was not looked at")
    return found


def demangle(name: str) -> str:
    return subprocess.run(["c++filt", name], capture_output=True, text=True, check=True).stdout


def ptxas_reports(log: str) -> dict[tuple[str, str], tuple[int, int, int]]:
    """(architecture, mangled name) -> registers, bytes spilled, static shared bytes."""
    found: dict[tuple[str, str], tuple[int, int, int]] = {}
    entry = re.compile(
        r"Compiling entry function '(\w+)' for 'sm_(\w+)'.*?"
        r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads.*?"
        r"Used (\d+) registers([^\n]*)",
        re.DOTALL,
    )
    for name, architecture, frame, stores, loads, registers, rest in entry.findall(log):
        shared = re.search(r"(\d+) bytes smem", rest)
        spilled = int(frame) + int(stores) + int(loads)
        found[architecture, name] = (int(registers), spilled, int(shared[1]) if shared else 0)
    return found


def compile_kernels(compiler: str, source: Path, folder: Path) -> list[Kernel]:
    folder.mkdir()
    # A fatbin: the host's half is compiled by `make build`, and by g++ for the emulation.
    command = [compiler, *FLAGS, f"-I{ROOT}", f"-I{ROOT / 'csrc'}", "-fatbin", str(source)]
    for architecture in ARCHITECTURES:
        command += ["-gencode", f"arch=compute_{architecture},code=sm_{architecture}"]
    command += ["-Xptxas", "-v", "--keep", "--keep-dir", str(folder)]
    command += ["-o", str(folder / "out.fatbin")]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 0, f"nvcc {source.name}:\n{run.stderr}"
    assert "warning" not in run.stderr, f"nvcc {source.name}:\n{run.stderr}"
    reports = ptxas_reports(run.stdout + run.stderr)
    kernels: list[Kernel] = []
    for path in sorted(folder.glob("*.ptx")):
        text = path.read_text()
        target = re.search(r"^\.target sm_(\w+)", text, re.MULTILINE)
        assert target is not None, path
        for entry in re.finditer(r"\.entry (\w+)\(.*?\n}\n", text, re.DOTALL):
            registers, spilled, shared = reports[target[1], entry[1]]
            kernels.append(
                Kernel(source.name, target[1], demangle(entry[1]), registers, spilled, shared,
                       entry[0])
            )  # fmt: skip
    return kernels


@pytest.fixture(scope="session")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> list[Kernel]:
    compiler = nvcc()
    folder = tmp_path_factory.mktemp("nvcc")
    sources = sorted((ROOT / "kernels").glob("*_cuda.cu"))
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        found = pool.map(lambda s: compile_kernels(compiler, s, folder / s.stem), sources)
        return [kernel for kernels in found for kernel in kernels]


@pytest.fixture(scope="session")
def wrappers(tmp_path_factory: pytest.TempPathFactory) -> list[Kernel]:
    """The probe kernels of wrappers.cu, one per function of kernels/ptx.h."""
    source = Path(__file__).with_name("wrappers.cu")
    return compile_kernels(nvcc(), source, tmp_path_factory.mktemp("wrappers") / "out")
