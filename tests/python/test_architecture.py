"""The import table of architecture: who may include or import whom, read off the sources."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

# Room of the core -> rooms it may include besides itself. Bindings may include everything.
MAY_INCLUDE = {
    "base": set(),
    "device": {"base"},
    "store": {"base", "device"},
    "cache": {"base"},
    "transfer": {"base", "device", "store"},
    "kernels": {"base"},
    "engine": {"base", "device", "store", "cache", "transfer", "kernels"},
    "predict": {"base", "kernels", "engine"},
    "simulate": {"base", "device", "store", "cache", "transfer", "kernels", "engine"},
}
ROOMS = {*MAY_INCLUDE, "bindings"}
# Who speaks to CUDA: one file of the device room, and kernels.
CUDA_FILES = {"device_cuda.cc", "ptx.h", "launch.h", "launch_check.h", "elements.cuh"}
INCLUDE = re.compile(r'^\s*#\s*include\s*["<]([^">]+)[">]', re.MULTILINE)


def include_violations(room: str, name: str, text: str) -> list[str]:
    """Includes of one source file of `room` that the table does not allow."""
    found: list[str] = []
    for include in INCLUDE.findall(text):
        head = include.split("/")[0]
        if head in ROOMS and head != room and head not in MAY_INCLUDE[room]:
            found.append(f"{name}: {room} may not include {include}")
        if head in {"torch", "ATen", "c10", "pybind11", "Python.h"}:
            found.append(f"{name}: {room} may not see {include}")
        speaks_cuda = name in CUDA_FILES or name.endswith("_cuda.cu")
        if include == "cuda.h" or (include.startswith("cuda") and not speaks_cuda):
            found.append(f"{name}: {room} may not see {include}")
        if head == "nvtx3" and name != "nvtx.cc":
            found.append(f"{name}: {room} may not see {include}")
    return found


def room_folder(room: str) -> Path:
    return ROOT / "kernels" if room == "kernels" else ROOT / "csrc" / room


def sources(room: str) -> list[Path]:
    return sorted(
        p for p in room_folder(room).rglob("*") if p.suffix in {".h", ".cc", ".cu", ".cuh"}
    )


@pytest.mark.parametrize("room", sorted(MAY_INCLUDE))
def test_a_room_includes_only_what_the_table_allows(room: str) -> None:
    files = sources(room)
    assert files, f"no sources in {room_folder(room)}"
    violations = [v for p in files for v in include_violations(room, p.name, p.read_text())]
    assert not violations, "\n".join(violations)


def test_the_include_rule_finds_a_planted_violation() -> None:
    assert include_violations("cache", "planted.cc", '#include "transfer/ticket.h"\n')
    assert include_violations("engine", "planted.cc", "#include <torch/torch.h>\n")
    assert include_violations("engine", "planted.cc", "#include <cuda_runtime_api.h>\n")
    assert include_violations("engine", "planted.cc", "#include <cuda.h>\n")
    assert include_violations("device", "device_cuda.cc", "#include <cuda.h>\n")  # the driver's
    assert include_violations("engine", "timeline.cc", "#include <nvtx3/nvToolsExt.h>\n")
    assert not include_violations("device", "nvtx.cc", "#include <nvtx3/nvToolsExt.h>\n")
    assert not include_violations("device", "device_cuda.cc", "#include <cuda_runtime_api.h>\n")
    assert not include_violations("engine", "fine.cc", '#include "cache/policy.h"\n')


# What g++ cannot compile, or means otherwise: kernels say it through ptx.h and launch.h.
NOT_PORTABLE = re.compile(r"\basm\b|<<<|__shared__|__CUDA_ARCH__|__expf\b|SLUICE_EMULATE")
DEVICE_GLOBAL = re.compile(r"^(?:static )?(?:__device__|__constant__)[^(){]*;", re.MULTILINE)


def portability_violations(name: str, text: str) -> list[str]:
    code = re.sub(r"//[^\n]*", "", text)
    found = DEVICE_GLOBAL.findall(code)
    if name not in {"ptx.h", "launch.h"}:
        found += NOT_PORTABLE.findall(code)
    return [f"{name}: {what}" for what in found]


def test_kernels_are_portable_between_nvcc_and_the_emulation() -> None:
    files = sources("kernels")
    assert any(path.suffix == ".cu" for path in files)
    violations = [
        violation
        for path in files
        if path.suffix != ".cc"  # the CPU's own
        for violation in portability_violations(path.name, path.read_text())
    ]
    assert not violations, "\n".join(violations)


def test_the_portability_rule_finds_a_planted_violation() -> None:
    assert portability_violations("x_cuda.cu", "kernel<<<1, 2>>>(p);\n")
    assert portability_violations("x_cuda.cu", "  __shared__ float partial[4];\n")
    assert portability_violations("x_cuda.cu", "__device__ int counter;\n")
    assert not portability_violations("ptx.h", '  asm volatile("bar.sync 0;");\n')
    assert not portability_violations("x_cuda.cu", "// asm\n__device__ float half(float x) {}\n")


def test_of_the_bindings_only_ops_sees_torch_and_it_sees_no_core() -> None:
    for path in (ROOT / "csrc" / "bindings").glob("*.cc"):
        includes = INCLUDE.findall(path.read_text())
        torch = [i for i in includes if i.startswith(("torch/", "ATen/", "c10/"))]
        if path.name == "ops.cc":
            own = [i for i in includes if i.split("/")[0] in ROOMS and i != "bindings/bridge.h"]
            assert torch and not own, (
                f"ops.cc links no core: it may include bridge.h alone, got {own}"
            )
        else:
            assert not torch, f"{path.name} includes {torch}"


def imports_of(tree: ast.AST) -> set[str]:
    """Top-level names of all modules that a file imports anywhere, absolute imports only."""
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            names.add(node.module.split(".")[0])
    return names


def test_only_the_hf_room_imports_transformers() -> None:
    for path in sorted((ROOT / "python" / "sluice").rglob("*.py")):
        inside = "hf" in path.relative_to(ROOT / "python" / "sluice").parts
        found = imports_of(ast.parse(path.read_text())) & {"transformers", "accelerate"}
        assert inside or not found, f"{path.name} imports {found}; only sluice.hf may"


def test_only_compat_reads_the_version_or_private_modules_of_transformers() -> None:
    private = re.compile(
        r"^\s*(?:from|import)\s+transformers\.(?:core_model_loading|conversion_mapping|cli|"
        r"integrations|generation\.|modeling_utils)|transformers\.__version__",
        re.MULTILINE,
    )
    for path in sorted((ROOT / "python" / "sluice").rglob("*.py")):
        if path.name != "compat.py":
            found = private.search(path.read_text())
            assert not found, f"{path.name} has {found[0].strip()!r}; ask hf/compat.py"


def test_in_the_hf_room_only_compat_names_private_parts_at_all() -> None:
    private = re.compile(
        r"__version__|core_model_loading|conversion_mapping|cli\.serving|integrations\.moe|"
        r"ALL_EXPERTS_FUNCTIONS|_experts_implementation_internal"
    )
    for path in sorted((ROOT / "python" / "sluice" / "hf").rglob("*.py")):
        found = private.search(path.read_text())
        assert path.name == "compat.py" or not found, f"{path.name} names {found}; ask hf/compat.py"


def test_the_package_never_prints() -> None:
    for path in sorted((ROOT / "python" / "sluice").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                assert node.func.id != "print", f"{path.name}:{node.lineno} prints"


def test_nothing_depends_on_what_lies_beside_the_repository() -> None:
    for folder in ("python", "csrc", "kernels", "tests", "benchmarks"):
        for path in (ROOT / folder).rglob("*"):
            if path.suffix in {".py", ".cc", ".h", ".toml"} and path != Path(__file__):
                assert "../shared" not in path.read_text(), f"{path} names ../shared"
