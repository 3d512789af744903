"""The real bodies of kernels/ptx.h, which no emulation runs: instruction and order of operands."""

import re

from .conftest import ARCHITECTURES, ROOT, Kernel

REGISTER = r"(%\w+)"

# Every function of kernels/ptx.h: what nvcc makes of it, registers reduced to %, and what the
# emulation runs in its place ("": nothing). Who changes one side looks at the other, then here.
FOUR = "{{%, %, %, %}}"
MMA = f"mma.sync.aligned.m16n8k16.row.col.f32.{{0}}.{{0}}.f32 {FOUR}, {FOUR}, {{{{%, %}}}}, {FOUR};"
GOLDEN = {
    "mma_bf16": (MMA.format("bf16"), "mma_m16n8k16(::simt::MmaType::kBf16, c.r, a.r, b.r, site)"),
    "mma_fp16": (MMA.format("f16"), "mma_m16n8k16(::simt::MmaType::kFp16, c.r, a.r, b.r, site)"),
    "ldmatrix_x4": (
        "ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%, %, %, %}, [%];",
        "ldmatrix_x4(rows, row, false, site)",
    ),
    "ldmatrix_x4_trans": (
        "ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%, %, %, %}, [%];",
        "ldmatrix_x4(rows, row, true, site)",
    ),
    "load_stream": (
        "ld.global.nc.L1::no_allocate.v4.u32 {%, %, %, %}, [%];",
        "load_16_bytes(address, site)",
    ),
    "cp_async16": (
        "cp.async.cg.shared.global [%], [%], 16, %;",
        "cp_async_16(to, from, from_bytes, site)",
    ),
    "cp_async_commit": ("cp.async.commit_group;", "cp_async_commit()"),
    # The probe waits for all but one, then for all.
    "cp_async_wait": (
        "cp.async.wait_group 1; cp.async.wait_group 0;",
        "cp_async_wait(kPending)",
    ),
    "grid_dependency_wait": ("griddepcontrol.wait;", "grid_dependency_wait(site)"),
    "grid_launch_dependents": ("griddepcontrol.launch_dependents;", ""),
    "load_acquire_gpu": ("ld.acquire.gpu.global.u32 %, [%];", "load_acquire(address, site)"),
    "load_acquire_sys": ("ld.acquire.sys.global.u32 %, [%];", "load_acquire(address, site)"),
    "store_release_gpu": (
        "st.release.gpu.global.u32 [%], %;",
        "store_release(address, value, site)",
    ),
    "store_release_sys": (
        "st.release.sys.global.u32 [%], %;",
        "store_release(address, value, site)",
    ),
}


def instructions(text: str) -> list[str]:
    return sorted(part.strip() + ";" for part in text.split(";") if part.strip())


def test_every_wrapper_emits_its_golden_text_and_nothing_else(wrappers: list[Kernel]) -> None:
    for architecture in ARCHITECTURES:
        found: list[str] = []
        for k in wrappers:
            if k.architecture == architecture:
                inline = re.findall(r"// begin inline asm(.*?)// end inline asm", k.ptx, re.DOTALL)
                found += instructions(re.sub(r"%\w+", "%", " ".join(inline)))
        expected = instructions(" ".join(golden for golden, _ in GOLDEN.values()))
        if architecture == "80":
            expected = [text for text in expected if not text.startswith("griddepcontrol")]
        assert sorted(found) == expected, f"sm_{architecture}"


def test_every_wrapper_has_a_golden_text_beside_what_the_emulation_runs() -> None:
    source = (ROOT / "kernels" / "ptx.h").read_text()
    functions = re.findall(
        r"__device__ __forceinline__ [\w:]+\s+(\w+)\([^{};]*?\) \{\n(.*?)\n\}", source, re.DOTALL
    )
    emulated: dict[str, str] = {}
    for name, body in functions:
        emulated[name] = ", ".join(re.findall(r"::simt::(\w+\(.*?\));", body))
    assert emulated == {name: call for name, (_, call) in GOLDEN.items()}


def probe(wrappers: list[Kernel], name: str) -> list[Kernel]:
    found = [k for k in wrappers if name in k.name]
    assert {k.architecture for k in found} == set(ARCHITECTURES), name
    return found


def loaded(ptx: str, parameter: int) -> list[str]:
    """Registers that 4-byte loads from pointer parameter `parameter` fill, by address."""
    return addressed(ptx, parameter, rf"ld\.global(?:\.nc)?\.[ufb]32\s+{REGISTER}, \[ADDRESS\]")


def stored(ptx: str, parameter: int) -> list[str]:
    return addressed(ptx, parameter, rf"st\.global\.[ufb]32\s+\[ADDRESS\], {REGISTER}")


def addressed(ptx: str, parameter: int, pattern: str) -> list[str]:
    pointer = re.search(rf"ld\.param\.[ub]64\s+{REGISTER}, \[\w+_param_{parameter}\]", ptx)
    assert pointer is not None, f"no parameter {parameter}"
    base = re.search(rf"cvta\.to\.global\.u64\s+{REGISTER}, {re.escape(pointer[1])};", ptx)
    assert base is not None, f"parameter {parameter} is no pointer"
    address = rf"{re.escape(base[1])}(?:\+(\d+))?"
    found = re.findall(pattern.replace("ADDRESS", address), ptx)
    pairs = [(int(a or 0), b) if a.isdigit() or not a else (int(b or 0), a) for a, b in found]
    return [register for _, register in sorted(pairs)]


def braces(registers: list[str]) -> str:
    return "{" + ", ".join(registers) + "}"


def instruction(ptx: str, opcode: str) -> str:
    """The operands of the one `opcode`, spaces made even."""
    found = re.findall(rf"{re.escape(opcode)}\s+([^;]+);", ptx)
    assert len(found) == 1, f"{opcode}: {len(found)} times"
    return re.sub(r"\s*,\s*", ", ", found[0]).strip()


def test_mma_takes_a_b_and_the_sums_in_their_order(wrappers: list[Kernel]) -> None:
    for kind, name in (("bf16", "mma<__nv_bfloat16>"), ("f16", "mma<__half>")):
        for k in probe(wrappers, name):
            opcode = f"mma.sync.aligned.m16n8k16.row.col.f32.{kind}.{kind}.f32"
            sums, result = loaded(k.ptx, 2), stored(k.ptx, 2)
            a, b = loaded(k.ptx, 0), loaded(k.ptx, 1)
            assert (len(a), len(b), len(sums), len(result)) == (4, 2, 4, 4), k.ptx
            # The sums go in and out in place: the asm copies them to its own registers first.
            operands = instruction(k.ptx, opcode)
            d, got_a, got_b, c = re.findall(r"{[^}]*}", operands)
            assert got_a == braces(a) and got_b == braces(b), operands
            assert moved(k.ptx, c, sums) and moved(k.ptx, d, result), operands


def moved(ptx: str, group: str, registers: list[str]) -> bool:
    """Whether the registers of `group` are `registers`, or plain copies of them, in order."""
    members = re.findall(r"%\w+", group)
    return len(members) == len(registers) and all(
        m == r or re.search(rf"mov\.[bfu]32\s+(?:{m}, {r}|{r}, {m});", ptx) is not None
        for m, r in zip(members, registers, strict=True)
    )


def test_ldmatrix_gives_matrices_in_their_order(wrappers: list[Kernel]) -> None:
    for name, opcode in (
        ("load_matrices<false>", "ldmatrix.sync.aligned.m8n8.x4.shared.b16"),
        ("load_matrices<true>", "ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16"),
    ):
        for k in probe(wrappers, name):
            operands = instruction(k.ptx, opcode)
            assert operands.startswith(braces(stored(k.ptx, 0))), operands


def test_load_stream_gives_words_in_their_order(wrappers: list[Kernel]) -> None:
    for k in probe(wrappers, "load_stream"):
        operands = instruction(k.ptx, "ld.global.nc.L1::no_allocate.v4.u32")
        assert operands.startswith(braces(stored(k.ptx, 1))), operands


def test_copies_name_16_bytes_and_how_many_are_real(wrappers: list[Kernel]) -> None:
    for k in probe(wrappers, "copy_async"):
        operands = instruction(k.ptx, "cp.async.cg.shared.global")
        bytes_register = re.search(rf"ld\.param\.[ub]32\s+{REGISTER}, \[\w+_param_1\]", k.ptx)
        assert bytes_register is not None
        assert re.fullmatch(rf"\[%\w+\], \[%\w+\], 16, {bytes_register[1]}", operands), operands
        order = re.findall(r"cp\.async\.(\w+)", k.ptx)
        assert order == ["cg", "commit_group", "wait_group", "wait_group"], order
        assert re.findall(r"cp\.async\.wait_group (\d)", k.ptx) == ["1", "0"]


def test_dependent_launch_is_hoppers(wrappers: list[Kernel]) -> None:
    for k in probe(wrappers, "depend"):
        found = re.findall(r"griddepcontrol\.(\w+);", k.ptx)
        expected = [] if k.architecture == "80" else ["wait", "launch_dependents"]
        assert found == expected, f"sm_{k.architecture}: {found}"


def test_acquire_and_release_name_their_scope(wrappers: list[Kernel]) -> None:
    for k in probe(wrappers, "order"):
        found = re.findall(r"\b(?:ld\.acquire|st\.release)\.\w+\.global\.u32", k.ptx)
        assert found == [
            "ld.acquire.gpu.global.u32", "st.release.gpu.global.u32",
            "ld.acquire.sys.global.u32", "st.release.sys.global.u32",
        ], found  # fmt: skip
