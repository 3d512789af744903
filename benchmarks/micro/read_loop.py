"""A kernel's rate beside that of a read loop over the same memory, sampled in turns."""

import statistics
from typing import Any

from harness import row

Results = dict[str, tuple[list[float], str]]
"""Per arm its samples, bytes/s, and why sampling stopped; "read-loop" is among them."""


def median_ratio(results: Results, arm: str, other: str) -> float:
    """Of the two arms' rates in the same round."""
    pairs = zip(results[arm][0], results[other][0], strict=True)
    return statistics.median(a / b for a, b in pairs)


def rate_row(
    scenario: dict[str, Any],
    arm: str,
    results: Results,
    *,
    tokens: int,
    working_set_bytes: int,
    correct: str,
    config: dict[str, Any],
    limit: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """The row of an arm. `achieved` is its rate over the read loop's."""
    samples, stop = results[arm]
    return row(
        scenario,
        mode=arm,
        metric=f"bytes_s_{tokens}_tokens",
        unit="B/s",
        better="higher",
        state="resident",
        samples=samples,
        stop=stop,
        correct=correct,
        config=config,
        data={"working_set_bytes": working_set_bytes, "tokens": tokens},
        limit={
            "read_loop_bytes_s": statistics.median(results["read-loop"][0]),
            "achieved": median_ratio(results, arm, "read-loop"),
            **(limit or {}),
        },
    )
