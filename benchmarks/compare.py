"""FASTER, SLOWER, SAME or UNCLEAR: what two rows of samples say of each other."""

import argparse
import json
import random
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

MIN_SAMPLES = 12


def median_ratio_interval(
    a: Sequence[float], b: Sequence[float], *, draws: int = 2000, seed: int = 0
) -> tuple[float, float, float]:
    """The median of a[i] / b[i], paired by order, and its bootstrap 95 % interval."""
    ratios = [x / y for x, y in zip(a, b, strict=False)]
    rng = random.Random(seed)
    medians = sorted(statistics.median(rng.choices(ratios, k=len(ratios))) for _ in range(draws))
    return medians[int(0.025 * draws)], statistics.median(ratios), medians[int(0.975 * draws)]


def refusal(a: dict[str, Any], b: dict[str, Any]) -> str | None:
    """Why two rows cannot be compared, if so."""
    for field in ("scenario_sha256", "metric", "phase", "machine", "data"):
        if a[field] != b[field]:
            return f"{field} differs"
    for row in (a, b):
        if row["dirty"]:
            return f"row {row['id']} is of a dirty tree"
        if row["n"] < MIN_SAMPLES:
            return f"row {row['id']} has {row['n']} samples, {MIN_SAMPLES} are needed"
    return None


def verdict(a: dict[str, Any], b: dict[str, Any], *, noise: float = 0.02) -> str:
    """How `a` does against `b`. `noise`: half-width of an A/A run, at least 2 %."""
    why = refusal(a, b)
    if why:
        return f"UNCLEAR ({why})"
    low, middle, high = median_ratio_interval(a["samples"], b["samples"])
    if a["better"] == "lower":
        low, middle, high = 1 / high, 1 / middle, 1 / low
    text = f"{middle:.3f} [{low:.3f}, {high:.3f}]"
    if 1 - noise <= low and high <= 1 + noise:
        return f"SAME {text}"
    if low > 1 + noise:
        return f"FASTER {text}"
    if high < 1 - noise:
        return f"SLOWER {text}"
    return f"UNCLEAR {text}"


def load_rows(path: Path) -> list[dict[str, Any]]:
    """Rows of one results file, those that a later row retracts left out."""
    rows = [json.loads(line) for line in path.read_text().splitlines() if line.strip()]
    retracted = {row["retracts"] for row in rows if "retracts" in row}
    return [row for row in rows if "retracts" not in row and row["id"] not in retracted]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("file", type=Path)
    parser.add_argument("a")
    parser.add_argument("b")
    parser.add_argument("--noise", type=float, default=0.02)
    args = parser.parse_args()
    rows = {row["id"]: row for row in load_rows(args.file)}
    missing = [name for name in (args.a, args.b) if name not in rows]
    if missing:
        sys.exit(f"compare: no row {missing} in {args.file}")
    sys.stdout.write(verdict(rows[args.a], rows[args.b], noise=args.noise) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
