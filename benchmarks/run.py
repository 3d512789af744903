"""Runs scenarios and appends their rows. `python benchmarks/run.py FILE… [--smoke] | clean`."""

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

import checkpoints  # noqa: E402
import harness  # noqa: E402
from machine import commit, machine, slug  # noqa: E402


def run_scenario(scenario: dict[str, Any]) -> list[dict[str, Any]]:
    """Rows of one scenario, by its kind and phase."""
    import torch

    if "threads" in scenario:
        torch.set_num_threads(scenario["threads"])
    if scenario["kind"] == "end_to_end":
        from end_to_end import generation as module
    elif scenario["kind"] == "replay":
        from replay import foresight as module
    elif scenario["kind"] == "micro" and scenario["phase"] == "module":
        from micro import experts_module as module
    elif scenario["kind"] == "micro" and scenario["phase"] == "kernel":
        from micro import kernel as module
    elif scenario["kind"] == "micro" and scenario["phase"] == "layers":
        from micro import layers as module
    elif scenario["kind"] == "micro" and scenario["phase"] == "gpu-kernel":
        from micro import gpu_kernel as module
    elif scenario["kind"] == "micro" and scenario["phase"] == "gpu-rates":
        from micro import gpu_rates as module
    else:
        raise ValueError(f"{scenario['name']}: kind {scenario['kind']!r} has no runner")
    return module.run(scenario)


def append(rows: list[dict[str, Any]], folder: Path) -> Path:
    """Appends to results/<machine>/<date>-<commit>.jsonl."""
    target = folder / slug(machine())
    target.mkdir(parents=True, exist_ok=True)
    path = target / f"{time.strftime('%Y-%m-%d', time.gmtime())}-{commit()[0]}.jsonl"
    with path.open("a") as file:
        for one in rows:
            file.write(json.dumps(one, sort_keys=True) + "\n")
    return path


def describe(one: dict[str, Any]) -> str:
    achieved = one["limit"].get("achieved")
    bound = one["limit"].get("bound")
    tail = f"  achieved {achieved:.2f}" if achieved else ""
    tail += f", bound: {bound}" if tail and bound else ""
    return (
        f"{one['scenario']:<28} {one['mode']:<24} {one['metric']:<24} "
        f"{one['p50']:.6g} {one['unit']} [{one['p20']:.6g}, {one['p80']:.6g}] n={one['n']} "
        f"{one['state']} {one['correct'].split(' ')[0]}{tail}"
    )


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("files", nargs="+", help="scenario files, or `clean`")
    parser.add_argument(
        "--smoke", action="store_true", help="seconds, on a tiny model, no rows kept"
    )
    parser.add_argument(
        "--share",
        type=float,
        help="of the scenario's budgets only this one, in percent: rows come sooner",
    )
    parser.add_argument("--out", type=Path, default=HERE / "results")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args(argv)
    if args.files == ["clean"]:
        removed = [str(p) for p in checkpoints.clean()]
        sys.stdout.write(json.dumps(removed) + "\n" if args.json else f"removed {len(removed)}\n")
        return 0
    for name in args.files:
        scenario = harness.load_scenario(Path(name))
        if args.share is not None:
            scenario["budget"]["expert_bytes"] = [args.share / 100]
        rows = run_scenario(harness.smoke(scenario) if args.smoke else scenario)
        if not args.smoke:
            append(rows, args.out)
        for one in rows:
            sys.stdout.write((json.dumps(one) if args.json else describe(one)) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
