"""Builds each planted violation and proves that the test which claims to find it fails.

A plant is a few lines behind `SLUICE_PLANT_<NAME>` that break one invariant. Its test must pass in
an ordinary build (`make test`) and fail here; a plant that no test notices fails this command.
"""

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[2]
EXPECTED = {f"I{i}" for i in range(1, 8)} | {f"LAW{i}" for i in range(1, 5)}


def build(name: str, target: str) -> Path:
    """The test executable of `target` with the plant `name` built in."""
    folder = ROOT / "build" / "planted"
    log = folder.with_suffix(".log")
    folder.mkdir(parents=True, exist_ok=True)
    configure = [
        *("cmake", "-G", "Ninja", "-S", str(ROOT), "-B", str(folder), "-DSLUICE_TESTS=ON"),
        *("-DSLUICE_PYTHON=OFF", "-DSLUICE_CUDA=OFF", f"-DSLUICE_PLANT={name}"),
    ]
    compile_ = ["cmake", "--build", str(folder), "--target", target, f"-j{os.cpu_count()}"]
    for command in (configure, compile_):
        with log.open("a") as out:
            if subprocess.run(command, stdout=out, stderr=out, check=False).returncode:
                sys.exit(f"planted {name}: build failed, see {log}")
    return next(folder.glob(f"tests/cpp/**/{target}"))


def found(plant: dict[str, str]) -> bool:
    """Whether the claiming test fails on the planted build (a crash or a hang counts)."""
    executable = build(plant["name"], plant["test"])
    command = [str(executable), f"--gtest_filter={plant['filter']}"]
    try:
        result = subprocess.run(
            command, capture_output=True, text=True, timeout=120, check=False, cwd=ROOT
        )
    except subprocess.TimeoutExpired:
        return True
    if "[==========] Running 0 tests" in result.stdout:
        sys.exit(f"planted {plant['name']}: no test matches {plant['filter']} in {plant['test']}")
    return result.returncode != 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", help="plants to try (default: all)")
    wanted = parser.parse_args().names
    plants = tomllib.loads((ROOT / "tests/planted/planted.toml").read_text())["plant"]
    missing = EXPECTED - {p["name"].split("_")[0] for p in plants}
    if missing and not wanted:
        sys.exit(f"planted.toml has no plant for {sorted(missing)}")
    unnoticed = 0
    for plant in plants:
        if wanted and plant["name"] not in wanted:
            continue
        start = time.monotonic()
        noticed = found(plant)
        unnoticed += not noticed
        verdict = "found by" if noticed else "NOT FOUND by"
        line = f"{plant['name']:<8} {verdict} {plant['filter']} ({time.monotonic() - start:.0f} s)"
        sys.stdout.write(line + f": {plant['what']}\n")
    sys.stdout.write(f"{unnoticed} planted violations went unnoticed\n")
    return 1 if unnoticed else 0


if __name__ == "__main__":
    sys.exit(main())
