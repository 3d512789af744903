"""What nvcc makes of the product's kernels: registers, spills, vector loads, tensor cores.

Counts are of instructions in the PTX, so of unrolled code: a comment in a kernel that claims a
width, a depth or a tensor core is true or one of these fails.
"""

import re

import pytest

from .conftest import ARCHITECTURES, FLAGS, ROOT, Kernel

MOST_REGISTERS = {"expert_gemv": 128, "expert_tiles": 128, "route": 64, "combine": 64,
                  "scatter_rows": 64, "read_bandwidth": 64}  # fmt: skip
LOAD_16 = "ld.global.nc.L1::no_allocate.v4.u32"


def of(kernels: list[Kernel], name: str) -> list[Kernel]:
    found = [k for k in kernels if f"{name}_kernel" in k.name]
    assert found, f"no kernel {name}"
    return found


def test_every_kernel_is_there_for_every_architecture(kernels: list[Kernel]) -> None:
    # Five pairs of types, paired rows or not, experts by value or by table.
    per_architecture = {"expert_gemv": 20, "expert_tiles": 20, "route": 3, "combine": 9,
                        "scatter_rows": 3, "read_bandwidth": 1, "nothing": 1,
                        "probe": 1}  # fmt: skip
    for name, count in per_architecture.items():
        for architecture in ARCHITECTURES:
            found = [k for k in of(kernels, name) if k.architecture == architecture]
            assert len(found) == count, f"{name}, sm_{architecture}"
    assert len(kernels) == len(ARCHITECTURES) * sum(per_architecture.values())


def test_no_kernel_spills_or_uses_local_memory(kernels: list[Kernel]) -> None:
    for k in kernels:
        where = f"{k.source}, sm_{k.architecture}: {k.name}"
        assert k.spill_bytes == 0, f"{where} has {k.spill_bytes} bytes of stack and spills"
        assert ".local" not in k.ptx, f"{where} uses local memory"


def test_no_kernel_needs_more_registers_than_its_launch_leaves(kernels: list[Kernel]) -> None:
    for name, most in MOST_REGISTERS.items():
        for k in of(kernels, name):
            assert k.registers <= most, f"sm_{k.architecture}: {k.name}: {k.registers} registers"


def test_static_shared_memory_is_what_the_plans_count_with(kernels: list[Kernel]) -> None:
    for name, header, constant in (
        ("expert_gemv", "expert_gemv.h", "kGemvStaticSharedBytes"),
        ("expert_tiles", "expert_tiles.h", "kTileStaticSharedBytes"),
    ):
        text = (ROOT / "kernels" / header).read_text()
        declared = re.search(rf"{constant} = ([\d* ]+);", text)
        assert declared is not None, f"{header} names no {constant}"
        most = 1
        for factor in declared[1].split("*"):
            most *= int(factor)
        for k in of(kernels, name):
            assert 0 < k.shared_bytes <= most, f"{k.name}: {k.shared_bytes} of {most} bytes"


def test_the_decode_pair_loads_weights_by_16_bytes_and_keeps_eight_in_flight(
    kernels: list[Kernel],
) -> None:
    for k in of(kernels, "expert_gemv"):
        # Four steps of two rows: once ahead of the loop, once in it, once for the next item.
        assert k.count(LOAD_16) == 3 * 8, k.name
        others = len(re.findall(r"ld\.global\.nc(?!\.L1::no_allocate\.v4)", k.ptx))
        assert others == 0, f"{k.name}: {others} read-only loads that are no weights"


def test_the_decode_pair_multiplies_on_tensor_cores_where_it_may(kernels: list[Kernel]) -> None:
    for k in of(kernels, "expert_gemv"):
        half = "MmaSums" in k.name
        kind = "bf16" if "BFloat16" in k.name else "f16"
        # Four steps, two mma each for tokens 0 to 7 and for 8 to 15.
        expected = 16 if half else 0
        assert k.count("mma.sync") == expected, k.name
        if half:
            instruction = f"mma.sync.aligned.m16n8k16.row.col.f32.{kind}.{kind}.f32"
            assert k.count(instruction) == expected, k.name
        assert "tf32" not in k.ptx, k.name


def test_tiles_copy_asynchronously_and_feed_the_tensor_cores_by_ldmatrix(
    kernels: list[Kernel],
) -> None:
    for k in of(kernels, "expert_tiles"):
        half = "MmaTile" in k.name
        # Per 64 columns: four steps of 2 x 4 mma, of two A and two B matrices.
        assert k.count("mma.sync") == (32 if half else 0), k.name
        assert k.count("ldmatrix.sync.aligned.m8n8.x4") == (16 if half else 0), k.name
        # A thread's share of 128 weight and 64 token rows, for the first step and for the next.
        narrow_weights = not half and "FmaTile<float>" not in k.name
        assert k.count("cp.async.cg.shared.global") == 2 * (4 if narrow_weights else 6), k.name
        assert "tf32" not in k.ptx, k.name


def test_reading_and_combining_use_vectors(kernels: list[Kernel]) -> None:
    for k in of(kernels, "read_bandwidth"):
        assert k.count(LOAD_16) == 4, k.name
    for k in of(kernels, "combine"):
        loads = len(re.findall(r"ld\.global\.v4\.(?:f32|u32|b32)", k.ptx))
        assert loads > 0, f"{k.name}: rows are read by less than 16 bytes"


def test_gates_keep_the_operations_of_the_host(kernels: list[Kernel]) -> None:
    assert "-fmad=false" in FLAGS
    assert "-fmad=false" in (ROOT / "kernels" / "CMakeLists.txt").read_text()
    for k in kernels:
        lines = {line.strip() for line in k.ptx.splitlines()}
        found = sorted(line for line in lines if re.search(r"\.approx|\.ftz|\.f64\b", line))
        assert not found, f"{k.name}: {found}"
    for k in of(kernels, "expert_gemv"):
        assert "div.rn.f32" in k.ptx, f"{k.name}: a sigmoid divides, correctly rounded"


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_only_hopper_and_later_start_early(kernels: list[Kernel], architecture: str) -> None:
    for k in kernels:
        if k.architecture != architecture:
            continue
        waits = k.count("griddepcontrol.wait") > 0
        stands_alone = re.search(r"(read_bandwidth|nothing|probe)_kernel", k.name)
        expected = architecture != "80" and stands_alone is None
        assert waits == expected, f"sm_{architecture}: {k.name}"
        assert (k.count("griddepcontrol.launch_dependents") > 0) == expected, k.name


def test_no_kernel_writes_by_atomics(kernels: list[Kernel]) -> None:
    for k in kernels:
        assert not re.search(r"\b(?:atom|red)\.", k.ptx), (
            f"{k.name}: results are bitwise repeatable"
        )
