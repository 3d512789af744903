"""Covering arrays: few rows in which every pair of two factors' values occurs.

Source: the greedy construction of D. M. Cohen, S. R. Dalal, M. L. Fredman, G. C. Patton, "The AETG
system" (IEEE TSE 23(7), 1997): build several candidates for the next row, keep the one that covers
most pairs not covered yet. Deterministic: the generator is seeded, dicts keep their order.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Mapping, Sequence
from typing import Any

Row = dict[str, Any]
Pair = tuple[str, Any, str, Any]
CANDIDATES = 40


def all_pairs(factors: Mapping[str, Sequence[Any]]) -> set[Pair]:
    """Every (factor, value, other factor, other value), factors in their given order."""
    return {
        (a, x, b, y)
        for a, b in itertools.combinations(factors, 2)
        for x in factors[a]
        for y in factors[b]
    }


def pairs_of(row: Row, order: Sequence[str]) -> set[Pair]:
    """The pairs one row covers."""
    return {(a, row[a], b, row[b]) for a, b in itertools.combinations(order, 2)}


def covering_rows(factors: Mapping[str, Sequence[Any]], seed: int = 0) -> list[Row]:
    """Rows that together cover `all_pairs(factors)`."""
    order = list(factors)
    rng = random.Random(seed)
    missing = all_pairs(factors)
    rows: list[Row] = []
    while missing:
        candidates = [_candidate(factors, missing, rng) for _ in range(CANDIDATES)]
        best = max(candidates, key=lambda row: len(missing & pairs_of(row, order)))
        missing -= pairs_of(best, order)
        rows.append({name: best[name] for name in order})
    return rows


def full_product(factors: Mapping[str, Sequence[Any]]) -> list[Row]:
    """Every combination, in order."""
    return [
        dict(zip(factors, values, strict=True)) for values in itertools.product(*factors.values())
    ]


def _candidate(factors: Mapping[str, Sequence[Any]], missing: set[Pair], rng: random.Random) -> Row:
    """A row around one missing pair, each further value the one that covers most of the missing."""
    a, x, b, y = rng.choice(sorted(missing, key=repr))
    row: Row = {a: x, b: y}
    rest = [name for name in factors if name not in row]
    rng.shuffle(rest)
    for name in rest:
        values = list(factors[name])
        rng.shuffle(values)
        row[name] = max(values, key=lambda v: _gain(row, name, v, missing))
    return row


def _gain(row: Row, name: str, value: Any, missing: set[Pair]) -> int:
    return sum(
        (other, kept, name, value) in missing or (name, value, other, kept) in missing
        for other, kept in row.items()
    )
