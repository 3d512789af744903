"""The command `sluice`: one module per verb, one place for output, errors and exit codes.

Exit codes: 0 done; 1 an error that sluice names, printed as one line (with its traceback under
`SLUICE_LOG=debug`); 2 the command line itself is wrong; 130 interrupted.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import traceback
from collections.abc import Sequence

from sluice.cli import bench, demo, doctor, generate, pack, plan, simulate, trace, train
from sluice.errors import SluiceError

_VERBS = (doctor, demo, generate, pack, plan, trace, train, simulate, bench)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one verb.

    Args:
        arguments: What follows the command's name; `sys.argv` without it.

    Returns:
        The exit code.
    """
    args = make_parser().parse_args(arguments)
    try:
        outcome = args.run(args)
    except KeyboardInterrupt:
        sys.stderr.write("sluice: interrupted\n")
        return 130
    except BrokenPipeError:  # `sluice plan … | head`: the reader left, which is no error of ours
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (SluiceError, OSError) as error:
        return _report(error, as_json=args.json)
    if args.json:
        _write(json.dumps(outcome.payload, indent=1, sort_keys=False, ensure_ascii=False))
    elif outcome.text:
        _write(outcome.text)
    return outcome.code


def make_parser() -> argparse.ArgumentParser:
    """The parser of all verbs."""
    from sluice import __version__

    parser = argparse.ArgumentParser(
        prog="sluice",
        description="Run Mixture-of-Experts language models that are larger than the memory they "
        "run in.",
    )
    parser.add_argument("--version", action="version", version=f"sluice {__version__}")
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", required=True)
    for module in _VERBS:
        verb = module.add_parser(verbs)
        verb.add_argument("--json", action="store_true", help="print one JSON object")
    return parser


def _report(error: BaseException, *, as_json: bool) -> int:
    """Prints an error as one line, and as JSON where the caller reads JSON."""
    if os.environ.get("SLUICE_LOG", "").lower() == "debug":
        traceback.print_exception(error)
    line = " ".join(str(error).split())
    sys.stderr.write(f"sluice: {type(error).__name__}: {line}\n")
    if as_json:
        _write(json.dumps({"error": {"type": type(error).__name__, "message": line}}))
    return 1


def _write(text: str) -> None:
    sys.stdout.write(text.rstrip("\n") + "\n")
    sys.stdout.flush()
