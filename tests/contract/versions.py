"""`make test-versions`: contract probe and battery on the floor, a middle and the latest release.

Makes one environment per release over the torch that is already there, runs the tests in it and
writes tests/contract/versions.md.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
# Floor, middle, latest of the supported window; the floor pins an older tokenizers.
RELEASES = ("5.13.1", "5.17.0", "5.24.0")
SUITES = ("tests/contract", "tests/battery")


def environment(release: str) -> Path:
    """A virtual environment with this transformers, over the packages of the running one."""
    folder = ROOT / "build" / "versions" / release
    python = folder / "bin" / "python"
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
        # The running environment's packages come behind this one's own.
        site = next(folder.glob("lib/python*/site-packages"))
        outer = [p for p in sys.path if p.endswith("site-packages")]
        # addsitedir, not a bare path: an editable install is a .pth there.
        lines = [f"import site; site.addsitedir({path!r})" for path in outer]
        (site / "outer.pth").write_text("\n".join(lines) + "\n")
        command = [str(python), "-m", "pip", "install", "-q", f"transformers=={release}"]
        subprocess.run(command, check=True)
    return python


def run(release: str) -> tuple[str, str, str]:
    """Per suite the closing line of pytest."""
    python = environment(release)
    lines = []
    for suite in SUITES:
        command = [
            str(python),
            "-m",
            "pytest",
            suite,
            "-m",
            "not long",
            "-p",
            "no:cacheprovider",
        ]
        result = subprocess.run(
            command, capture_output=True, text=True, check=False, cwd=ROOT,
            env={**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": ""},
        )  # fmt: skip
        log = ROOT / "build" / "versions" / f"{release}-{Path(suite).name}.log"
        log.write_text(result.stdout + result.stderr)
        closing = [x for x in result.stdout.splitlines() if re.search(r"passed|failed|error", x)]
        line = re.sub(r"=+|\x1b\[[0-9;]*m", "", closing[-1]).strip() if closing else "no result"
        lines.append(re.sub(r" in [0-9.]+s.*", "", line))
    return release, lines[0], lines[1]


def main() -> int:
    rows = [run(release) for release in RELEASES]
    table = ["| transformers | contract probe | battery |", "| --- | --- | --- |"]
    table += [f"| {' | '.join(row)} |" for row in rows]
    text = "# Releases that were run\n\n`make test-versions` writes this table.\n\n"
    (ROOT / "tests" / "contract" / "versions.md").write_text(text + "\n".join(table) + "\n")
    sys.stdout.write("\n".join(table) + "\n")
    return int(any("failed" in x or "error" in x or x == "no result" for r in rows for x in r[1:]))


if __name__ == "__main__":
    sys.exit(main())
