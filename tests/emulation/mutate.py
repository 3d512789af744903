"""Breaks the kernels in small ways, one at a time, and lists what no test notices.

    python tests/emulation/mutate.py                       # every kernel: an hour or two
    python tests/emulation/mutate.py kernels/route_cuda.cu --sample 50

A mutant (mutants.py) is compiled into one kernel source of one flavour at a time, `fast` first, and
that source's tests run until one fails. An object that equals the unchanged one needs no test. The
unchanged kernels come first, as control: a test that fails by itself would kill every mutant.

All happens in a copy of the tree, taken once, under build/mutants: a sweep that is stopped goes on
where it was. `--retry-survivors` copies the tree as it is now, for better tests, and forgets the
verdicts on changed files and the survivors that nobody has explained; `--fresh` forgets every one.
mutants.toml explains the survivors: one that it does not name fails, and so does a name that
survives no longer.
"""

import argparse
import json
import os
import random
import resource
import shlex
import shutil
import subprocess
import sys
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

sys.path.insert(0, str(Path(__file__).parent))
from mutants import Mutant, mutants_of, mutated

ROOT = Path(__file__).resolve().parents[2]
COPY = ROOT / "build" / "mutants"
TREE, BUILD, VERDICTS = COPY / "tree", COPY / "build", COPY / "verdicts.jsonl"
EXPLAINED = Path(__file__).with_name("mutants.toml")
FLAVOURS = ("fast", "checked")
# Which tests run a source's kernels, the quickest first.
TESTS = {
    "bandwidth": ("combine_test",),
    "combine": ("combine_test", "layer_test"),
    "dependent_launch": ("cuda_surroundings_test",),
    "route": ("route_test", "layer_test"),
    "expert_gemv": ("expert_gemv_test", "layer_test"),
    "expert_tiles": ("expert_tiles_test", "layer_test"),
}
# Of the kernels, beside every .cuh; and where what only the CPU compiles begins.
HEADERS = {"kernels/elementwise.h": "SLUICE_TIER void gate_loop("}


def tests_of(source: str) -> tuple[str, ...]:
    stem = Path(source).stem
    for prefix, tests in TESTS.items():
        if stem.startswith(prefix):
            return tests
    sys.exit(f"mutate: got {source}, expected a kernel that TESTS names; add its tests there")


def all_mutants(file: str) -> list[Mutant]:
    source = (TREE / file).read_text()
    if file in HEADERS:
        source = source[: source.index(HEADERS[file])]
    return list(mutants_of(file, source))


def say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def call(command: str | list[str]) -> bool:
    """Whether it succeeds, in the build folder. What it says goes to build/mutants/log."""
    with (COPY / "log").open("a") as log:
        shell = isinstance(command, str)
        return not subprocess.run(
            command, cwd=BUILD, shell=shell, stdout=log, stderr=log
        ).returncode


def copy_tree() -> None:
    """The working tree, committed or not. Files of the same bytes keep their time, for ninja."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    names = {name for name in listed.split("\0") if name and (ROOT / name).is_file()}
    for old in [path for path in TREE.rglob("*") if path.is_file()]:
        if str(old.relative_to(TREE)) not in names:
            old.unlink()
    for name in names:
        source, target = ROOT / name, TREE / name
        if not target.is_file() or target.read_bytes() != source.read_bytes():
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, target)


def renew_tree() -> None:
    """The tree as it is now. Verdicts on unchanged files stay, but for unexplained survivors."""
    before = {path: path.read_bytes() for path in (TREE / "kernels").iterdir()}
    copy_tree()
    lines = VERDICTS.read_text().splitlines(keepends=True) if VERDICTS.exists() else []
    explained = explanations()
    kept: list[str] = []
    for line in lines:
        entry = json.loads(line)
        mutant = Mutant(**entry["mutant"])
        path = TREE / mutant.file
        unchanged = path.exists() and path.read_bytes() == before.get(path)
        survived = entry["result"]["verdict"] == "survived"
        if unchanged and not (survived and (mutant.file, mutant.name()) not in explained):
            kept.append(line)
    VERDICTS.write_text("".join(kept))


def build(jobs: int) -> None:
    """The unchanged tests."""
    BUILD.mkdir(exist_ok=True)
    names = sorted(
        {f"{t}_{flavour}" for tests in TESTS.values() for t in tests for flavour in FLAVOURS}
    )
    options = ("-DSLUICE_TESTS=ON", "-DSLUICE_PYTHON=OFF", "-DSLUICE_CUDA=OFF")
    if not call(["cmake", "-G", "Ninja", "-S", str(TREE), "-B", str(BUILD), *options]):
        sys.exit(f"mutate: cmake failed, see {COPY / 'log'}")
    if not call(["cmake", "--build", str(BUILD), f"-j{jobs}", "--target", *names]):
        sys.exit(f"mutate: the unchanged tree does not build, see {COPY / 'log'}")


def ninja(*arguments: str) -> str:
    command = ["ninja", "-C", str(BUILD), "--quiet", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


@dataclass(frozen=True)
class Unit:
    """A kernel source in a flavour: how it is compiled, and what it is compiled of."""

    source: str  # relative to the root
    flavour: str
    command: str
    object_bytes: int
    reads: frozenset[str]  # files under kernels/


def find_units() -> list[Unit]:
    units: list[Unit] = []
    for entry in json.loads((BUILD / "compile_commands.json").read_text()):
        for flavour in FLAVOURS:
            if f"sluice_tier_kernels_{flavour}.dir" not in entry["output"]:
                continue
            listed = ninja("-t", "deps", os.path.relpath(entry["output"], BUILD)).splitlines()[1:]
            read = {os.path.relpath(name.strip(), TREE) for name in listed if name.strip()}
            kernels = frozenset(name for name in read if name.startswith("kernels/"))
            source = os.path.relpath(entry["file"], TREE)
            size = Path(entry["output"]).stat().st_size
            units.append(Unit(source, flavour, entry["command"], size, kernels))
    # The fast flavour kills most, and quicker; and what is small is compiled soon.
    return sorted(units, key=lambda u: (FLAVOURS.index(u.flavour), u.object_bytes))


@dataclass
class Case:
    """One test of one executable, and the seconds of CPU it takes on the unchanged kernels."""

    test: str
    name: str
    seconds: float
    kills: int = 0


class Tests:
    """The cases of every test in every flavour; those that kill most per second come first."""

    def __init__(self) -> None:
        self._cases: dict[tuple[str, str], list[Case]] = {}
        self._lock = threading.Lock()

    def cases(self, flavour: str, test: str) -> list[Case]:
        with self._lock:
            return list(self._cases[flavour, test])

    def run_control(self, jobs: int) -> None:
        tests = sorted({t for tests in TESTS.values() for t in tests})
        pairs = [(flavour, test) for flavour in FLAVOURS for test in tests]
        with ThreadPoolExecutor(jobs) as pool:
            self._cases = dict(zip(pairs, pool.map(self._control, pairs), strict=True))

    def _control(self, pair: tuple[str, str]) -> list[Case]:
        flavour, test = pair
        executable = next(BUILD.glob(f"tests/**/{test}_{flavour}"))
        found: list[Case] = []
        listed = subprocess.run(
            [executable, "--gtest_list_tests"], capture_output=True, text=True, check=True
        )
        suite = ""
        for line in listed.stdout.splitlines():
            if not line.startswith(" "):
                suite = line
                continue
            name = suite + line.split("#")[0].strip()
            passed, seconds = run_case(executable, name, None)
            if not passed:
                sys.exit(f"mutate: the control fails: {name} ({flavour}); mend it first")
            found.append(Case(test, name, seconds))
        return sorted(found, key=lambda c: c.seconds)

    def killed_by(self, flavour: str, case: Case) -> None:
        with self._lock:
            case.kills += 1
            self._cases[flavour, case.test].sort(key=lambda c: c.seconds / (1 + c.kills))


def run_case(executable: Path, name: str, cpu_seconds: float | None) -> tuple[bool, float]:
    """Whether it passes, within so many seconds of CPU, and how many it took."""

    def limit() -> None:
        if cpu_seconds is not None:
            seconds = int(cpu_seconds) + 1
            resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))

    command = [str(executable), f"--gtest_filter={name}", "--gtest_fail_fast"]
    with (COPY / "log").open("a") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, preexec_fn=limit)
        # Waiting forever takes no CPU; this is far above what a busy machine makes of the limit.
        timer = threading.Timer(60 + 20 * (cpu_seconds or 600), process.kill)
        timer.start()
        _, status, usage = os.wait4(process.pid, 0)
        timer.cancel()
        process.returncode = os.waitstatus_to_exitcode(status)
    return process.returncode == 0, usage.ru_utime + usage.ru_stime


class Worker:
    """Tries mutants, in a folder of its own that shadows the tree's kernels."""

    def __init__(self, number: int, units: list[Unit], tests: Tests) -> None:
        self._shadow = COPY / f"shadow-{number}"
        self._units = units
        self._tests = tests
        self._controls: dict[Unit, bytes] = {}
        shutil.rmtree(self._shadow, ignore_errors=True)
        shutil.copytree(TREE / "kernels", self._shadow / "kernels")

    def try_one(self, mutant: Mutant) -> dict[str, str]:
        """Its verdict: killed (by what), survived, same code or does not compile."""
        units = [u for u in self._units if mutant.file in u.reads]
        for unit in units:
            if unit not in self._controls:
                self._controls[unit] = self._compile(unit) or sys.exit(
                    f"mutate: {unit.source} does not compile"
                )
        target = self._shadow / mutant.file
        original = target.read_text()
        target.write_text(mutated(original, mutant))
        try:
            return self._verdict(units)
        finally:
            target.write_text(original)

    def _verdict(self, units: list[Unit]) -> dict[str, str]:
        changed = False
        for unit in units:
            code = self._compile(unit)
            if code is None:
                return {"verdict": "does not compile"}
            if code == self._controls[unit]:
                continue
            changed = True
            for test in tests_of(unit.source):
                executable = self._link(unit, test)
                for case in self._tests.cases(unit.flavour, test):
                    passed, _ = run_case(executable, case.name, 5 + 5 * case.seconds)
                    if not passed:
                        self._tests.killed_by(unit.flavour, case)
                        return {"verdict": "killed", "by": f"{case.name} ({unit.flavour})"}
        return {"verdict": "survived" if changed else "same code"}

    def _compile(self, unit: Unit) -> bytes | None:
        """The object of the source as it is in the shadow, and None where it does not compile."""
        compiler, _, rest = unit.command.partition(" ")
        arguments = shlex.split(rest)
        arguments[arguments.index("-o") + 1] = str(self._object)
        arguments[arguments.index("-c") + 1] = str(self._shadow / unit.source)
        # Without lines and folders an object depends on the code alone.
        options = [f"-I{self._shadow}", *arguments, "-g0", f"-ffile-prefix-map={self._shadow}/=/"]
        options.append("-Werror=array-bounds")  # as `make test`, but for what deletions leave
        if not call([compiler, *options]):
            return None
        return self._object.read_bytes()

    def _link(self, unit: Unit, test: str) -> Path:
        """`test` with the shadow's object, which comes before the library that has the original."""
        name = f"{test}_{unit.flavour}"
        original = next(BUILD.glob(f"tests/**/{name}")).relative_to(BUILD)
        command = ninja("-t", "commands", "-s", str(original)).strip().splitlines()[-1]
        executable = self._shadow / name
        linked = command.replace(f" -o {original} ", f" {self._object} -o {executable} ")
        if linked == command or not call(linked):
            sys.exit(f"mutate: {name} does not link, see {COPY / 'log'}")
        return executable

    @property
    def _object(self) -> Path:
        return self._shadow / "mutant.o"


def explanations() -> dict[tuple[str, str], str]:
    """(file, changed line) -> why no test can notice, or need not."""
    groups = tomllib.loads(EXPLAINED.read_text()).get("survivors", [])
    return {(group["file"], name): group["why"] for group in groups for name in group["mutants"]}


def judge(files: list[str], tried: dict[Mutant, dict[str, str]], whole: bool) -> int:
    """Prints what the sweep found; 1 where mutants.toml says something else."""
    explained = explanations()
    survivors = [m for m, result in tried.items() if result["verdict"] == "survived"]
    surprises = [m for m in survivors if (m.file, m.name()) not in explained]
    for mutant in surprises:
        say(f"survives: {mutant.describe()}")
    names = {(m.file, m.name()) for m in survivors}
    stale = [key for key in explained if whole and key[0] in files and key not in names]
    for file, name in stale:
        say(f"{EXPLAINED.name} is stale: this is no mutant that survives: {file}: {name}")
    counts = Counter(result["verdict"] for result in tried.values())
    verdicts = ", ".join(f"{verdict}: {count}" for verdict, count in sorted(counts.items()))
    say(f"{len(tried)} mutants; {verdicts}; unexplained: {len(surprises)}; stale: {len(stale)}")
    return 1 if surprises or stale else 0


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("files", nargs="*", help="relative to the root; all kernels without")
    parser.add_argument("--sample", type=int, help="try this many, chosen by --seed")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument(
        "--retry-survivors",
        action="store_true",
        help="those without explanation, on the tree as it is now",
    )
    parser.add_argument("--fresh", action="store_true", help="all, on the tree as it is now")
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    arguments = parser.parse_args()

    COPY.mkdir(parents=True, exist_ok=True)
    if arguments.fresh or not TREE.exists():
        VERDICTS.unlink(missing_ok=True)
        copy_tree()
    elif arguments.retry_survivors:
        renew_tree()
    build(arguments.jobs)
    units = find_units()
    for unit in units:
        tests_of(unit.source)
    kernels = sorted(
        {u.source for u in units}
        | {f for u in units for f in u.reads if f.endswith(".cuh")}
        | set(HEADERS)
    )
    files: list[str] = arguments.files or kernels
    for file in files:
        if file not in kernels:
            sys.exit(f"mutate: got {file}, expected one of {', '.join(kernels)}")
    mutants = [m for file in files for m in all_mutants(file)]
    if arguments.sample is not None and arguments.sample < len(mutants):
        mutants = random.Random(arguments.seed).sample(mutants, arguments.sample)

    tried: dict[Mutant, dict[str, str]] = {}
    if VERDICTS.exists():
        for line in VERDICTS.read_text().splitlines():
            entry = json.loads(line)
            tried[Mutant(**entry["mutant"])] = entry["result"]
    # The files that are compiled soonest first, so that a sweep that is stopped has judged many.
    cost = {f: sum(u.object_bytes for u in units if f in u.reads) for f in files}
    left = sorted((m for m in mutants if m not in tried), key=lambda m: cost[m.file])
    if left:
        tests = Tests()
        tests.run_control(arguments.jobs)
        say(f"the control passes; {len(left)} of {len(mutants)} mutants to try")
        workers = [Worker(number, units, tests) for number in range(arguments.jobs)]
        lock = threading.Lock()

        def attempt(mutant: Mutant) -> None:
            with lock:
                worker = workers.pop()
            result = worker.try_one(mutant)
            with lock:
                workers.append(worker)
                tried[mutant] = result
                with VERDICTS.open("a") as journal:
                    journal.write(json.dumps({"mutant": asdict(mutant), "result": result}) + "\n")
            if result["verdict"] == "survived":
                say(f"survives: {mutant.describe()}")

        with ThreadPoolExecutor(arguments.jobs) as pool:
            for _ in pool.map(attempt, left):
                pass
    return judge(files, {m: tried[m] for m in mutants}, arguments.sample is None)


if __name__ == "__main__":
    sys.exit(main())
