"""`sluice bench`: hands a scenario to the harness in the source tree."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from sluice.cli.common import Outcome
from sluice.errors import ConfigError


def add_parser(verbs: Any) -> argparse.ArgumentParser:
    """Registers the verb."""
    parser: argparse.ArgumentParser = verbs.add_parser(
        "bench",
        help="run a benchmark scenario from the source tree",
        description="Runs benchmarks/run.py of the checkout that holds the current folder or "
        "this package. Arguments after the scenario go to it unchanged.",
    )
    parser.add_argument("scenario", metavar="FILE", help="a scenario (.toml), or `clean`")
    parser.add_argument("rest", nargs=argparse.REMAINDER, metavar="...", help="for the harness")
    parser.set_defaults(run=run)
    return parser


def run(args: argparse.Namespace) -> Outcome:
    """Runs the harness and passes its exit code on."""
    harness = find_harness(Path.cwd(), Path(__file__).resolve())
    rest = [word for word in args.rest if word != "--json"]
    args.json = args.json or len(rest) < len(args.rest)  # a flag after the scenario is ours too
    command = [sys.executable, str(harness), args.scenario, *rest]
    if not args.json:
        return Outcome({}, "", subprocess.run(command, check=False).returncode)
    done = subprocess.run([*command, "--json"], check=False, text=True, stdout=subprocess.PIPE)
    rows = [json.loads(line) for line in done.stdout.splitlines() if line.strip()]
    return Outcome({"exit_code": done.returncode, "rows": rows}, "", done.returncode)


def find_harness(*starts: Path) -> Path:
    """`benchmarks/run.py` in the nearest folder at or above one of `starts`.

    Raises:
        ConfigError: There is none: a wheel carries no scenarios.
    """
    for start in starts:
        for folder in (start, *start.parents):
            harness = folder / "benchmarks" / "run.py"
            if harness.is_file() and (folder / "python" / "sluice").is_dir():
                return harness
    raise ConfigError(
        f"sluice bench: got no benchmarks/run.py at or above {starts[0]}, expected sluice's source "
        "tree, where the scenarios live; clone it and run the command there"
    )
