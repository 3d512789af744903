"""The generator of covering arrays covers, repeats itself, and is much smaller than the product."""

from __future__ import annotations

import pytest

from .pairwise import all_pairs, covering_rows, full_product, pairs_of

SHAPES = [
    {"a": [1, 2], "b": [1, 2]},
    {"a": [1, 2, 3], "b": "vwxyz", "c": [True, False], "d": [0, 1, 2, 3]},
    {"a": range(7), "b": range(5), "c": range(3), "d": range(3), "e": range(2), "f": range(2)},
    {"one": ["x"], "two": [1, 2, 3]},
]


@pytest.mark.parametrize("factors", SHAPES)
def test_every_pair_of_values_occurs_in_some_row(factors):
    rows = covering_rows(factors)
    covered = set().union(*(pairs_of(row, list(factors)) for row in rows))
    assert covered == all_pairs(factors)
    assert all(list(row) == list(factors) for row in rows)


@pytest.mark.parametrize("factors", SHAPES)
def test_rows_are_few_and_the_same_every_time(factors):
    rows = covering_rows(factors, seed=3)
    sizes = sorted((len(v) for v in factors.values()), reverse=True)
    assert rows == covering_rows(factors, seed=3)
    assert sizes[0] * sizes[1] <= len(rows) <= 2 * sizes[0] * sizes[1]


def test_full_product_has_every_combination_once():
    rows = full_product({"a": [1, 2, 3], "b": "xy"})
    assert len(rows) == 6 == len({tuple(r.items()) for r in rows})


def test_a_missing_row_leaves_a_pair_uncovered():
    factors = SHAPES[0]
    rows = covering_rows(factors)[:-1]
    assert set().union(*(pairs_of(row, list(factors)) for row in rows)) != all_pairs(factors)
