"""Breaks kernels in small ways, one at a time, and lists what the tests did not notice.

Each mutant deletes a barrier, a fence or a wait, or nudges a constant, an index or a comparison. It
is built and tested in a copy of the tree under build/mutants, so the tree stays as it is. The
unchanged kernel comes first, as control: a test that fails by itself would kill every mutant.

    python tests/emulation/mutate.py kernels/combine_cuda.cu --target combine_test_checked
"""

import argparse
import os
import random
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
COPY = ROOT / "build" / "mutants"

# name, pattern, replacement. Deleted statements leave an empty one.
RULES = [
    ("no barrier", r"__syncthreads\(\);", ";"),
    ("no warp barrier", r"__syncwarp\([^)]*\);", ";"),
    ("no fence", r"__threadfence(_system)?\(\);", ";"),
    ("no copy wait", r"(ptx::)?cp_async_wait<[^>]*>\(\);", ";"),
    ("no commit", r"(ptx::)?cp_async_commit\(\);", ";"),
    ("no dependency wait", r"(ptx::)?grid_dependency_wait\(\);", ";"),
    ("< to <=", r" < (?=[\w(])", " <= "),
    ("<= to <", r" <= ", " < "),
    ("> to >=", r" > (?=[\w(])", " >= "),
    (">= to >", r" >= ", " > "),
    ("== to !=", r" == ", " != "),
    ("!= to ==", r" != ", " == "),
    ("&& to ||", r" && ", " || "),
    ("|| to &&", r" \|\| ", " && "),
    ("+ to -", r" \+ (?=[\w(])", " - "),
    ("- to +", r" - (?=[\w(])", " + "),
    ("+= to =", r" \+= ", " = "),
    ("% left out", r" % [\w.]+", ""),
    ("x to y", r"\.x\b", ".y"),
    ("z to w", r"\.z\b", ".w"),
    ("min to max", r"\bmin\(", "max("),
    ("max to min", r"\bmax\(", "min("),
    ("zero to one", r"(?<![\w.])0(?![\w.])", "1"),
]
INTEGER = re.compile(r"(?<![\w.])(?:[2-9]|[1-9]\d+)(?![\w.])")
# Declarations, comments and what no thread runs.
SKIPPED = re.compile(
    r"^\s*(//|#|template|static_assert|namespace|using|case |\}|\*)|__launch_bounds__"
)


@dataclass(frozen=True, slots=True)
class Mutant:
    """One changed line of one file."""

    file: Path
    line: int
    rule: str
    text: str


def mutants_of(file: Path) -> Iterator[Mutant]:
    """Every place of every rule, line by line."""
    lines = (ROOT / file).read_text().splitlines()
    for number, line in enumerate(lines, 1):
        code = line.split("//")[0].rstrip()
        if not code or SKIPPED.search(code):
            continue
        for name, pattern, replacement in RULES:
            for match in re.finditer(pattern, code):
                text = code[: match.start()] + match.expand(replacement) + code[match.end() :]
                yield Mutant(file, number, name, text)
        for match in INTEGER.finditer(code):
            halved = str(int(match[0]) // 2)
            text = code[: match.start()] + halved + code[match.end() :]
            yield Mutant(file, number, f"{match[0]} to {halved}", text)


def copy_tree() -> None:
    """The files of the working tree, committed or not, where they differ from the copy's."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    for name in filter(None, listed.split("\0")):
        source, target = ROOT / name, COPY / "tree" / name
        if not source.is_file():
            continue
        if target.is_file() and target.read_bytes() == source.read_bytes():
            continue
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, target)


def run(command: list[str], timeout: float | None = None) -> int | None:
    """Its exit status, None when it ran too long. What it says goes to build/mutants/log."""
    with (COPY / "log").open("a") as log:
        log.write(f"$ {' '.join(command)}\n")
        log.flush()
        try:
            return subprocess.run(command, stdout=log, stderr=log, timeout=timeout).returncode
        except subprocess.TimeoutExpired:
            return None


def build(targets: list[str], jobs: int) -> bool:
    """Whether it compiles."""
    return run(["cmake", "--build", str(COPY / "build"), f"-j{jobs}", "--target", *targets]) == 0


def configure() -> None:
    options = ("-DSLUICE_TESTS=ON", "-DSLUICE_PYTHON=OFF", "-DSLUICE_CUDA=OFF")
    command = [
        "cmake",
        "-G",
        "Ninja",
        "-S",
        str(COPY / "tree"),
        "-B",
        str(COPY / "build"),
        *options,
    ]
    if run(command) != 0:
        sys.exit(f"mutate: cmake failed, see {COPY / 'log'}")


def say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("files", nargs="+", type=Path, help="kernels, relative to the root")
    parser.add_argument("--target", action="append", required=True, help="a test; may be repeated")
    parser.add_argument("--filter", default="*", help="of GoogleTest")
    parser.add_argument("--sample", type=int, help="try this many, chosen by --seed")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    arguments = parser.parse_args()
    targets: list[str] = arguments.target

    COPY.mkdir(parents=True, exist_ok=True)
    copy_tree()
    configure()

    def survives(timeout: float | None) -> bool:
        for target in targets:
            executable = next((COPY / "build").glob(f"tests/**/{target}"))
            if run([str(executable), f"--gtest_filter={arguments.filter}"], timeout) != 0:
                return False
        return True

    if not build(targets, arguments.jobs):
        sys.exit(f"mutate: the unchanged tree does not build, see {COPY / 'log'}")
    start = time.monotonic()
    if not survives(None):
        sys.exit("mutate: the control fails: mend the tests on the unchanged kernels first")
    timeout = 5 + 5 * (time.monotonic() - start)

    mutants = [mutant for file in arguments.files for mutant in mutants_of(file)]
    if arguments.sample is not None and arguments.sample < len(mutants):
        chosen = random.Random(arguments.seed).sample(range(len(mutants)), arguments.sample)
        mutants = [mutants[i] for i in sorted(chosen)]
    say(f"control passes in {(timeout - 5) / 5:.1f} s; {len(mutants)} mutants")

    killed, broken, survivors = 0, 0, list[Mutant]()
    for mutant in mutants:
        target = COPY / "tree" / mutant.file
        original = (ROOT / mutant.file).read_text()
        lines = original.splitlines()
        lines[mutant.line - 1] = mutant.text
        target.write_text("\n".join(lines) + "\n")
        if not build(targets, arguments.jobs):
            broken += 1
        elif survives(timeout):
            survivors.append(mutant)
            place = f"{mutant.file}:{mutant.line}"
            say(f"survives: {place} ({mutant.rule}): {mutant.text.strip()}")
        else:
            killed += 1
        target.write_text(original)
    say(f"killed {killed}, survived {len(survivors)}, did not compile {broken}")
    return 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(main())
