"""Rates of experts by key: rows of small integers that stand for sets of experts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sluice.errors import CheckpointError
from sluice.predict.arrays import take
from sluice.predict.training_free.counting import check_rates

Array = NDArray[Any]


class KeyedRates:
    """`P(e | key)`, smoothed by what it backs off to.

    Args:
        keys: int16 `[M, W]`, no row twice.
        rates: float32 `[M, E]`.
        times: int64 `[M]`: how often each was counted; decides who is dropped.
    """

    def __init__(self, keys: Array, rates: Array, times: Array) -> None:
        self.keys, self.rates, self.times = keys, rates, times

    @classmethod
    def counted(cls, keys: Array, used: Array, behind: Array, weight: Any) -> KeyedRates:
        """Counts `used` by key: `(count(key, e) + weight behind) / (count(key) + weight)`.

        Args:
            keys: int16 `[N, W]`, one a token.
            used: float32 `[N, E]` of ones.
            behind: float32 `[N, E]` or `[E]`: what each key backs off to.
            weight: Of the back-off, in occurrences.
        """
        distinct, first, owner, times = np.unique(
            keys, axis=0, return_index=True, return_inverse=True, return_counts=True
        )
        counts = np.zeros((len(distinct), used.shape[1]), np.float32)
        np.add.at(counts, owner.reshape(-1), used)
        back = np.broadcast_to(behind, used.shape)[first]
        rates = (counts + weight * back) / (times[:, None].astype(np.float32) + weight)
        return cls(distinct, rates, times)

    @classmethod
    def joined(cls, tables: Sequence[KeyedRates], max_keys: int) -> KeyedRates:
        """All tables as one, of at most `max_keys` keys: the rarest are dropped."""
        keys = np.concatenate([table.keys for table in tables])
        rates = np.concatenate([table.rates for table in tables])
        times = np.concatenate([table.times for table in tables])
        kept = np.sort(np.argsort(-times, kind="stable")[:max_keys])
        return cls(keys[kept], rates[kept], times[kept])

    @classmethod
    def of_state(
        cls, arrays: Mapping[str, Array], name: str, width: int, num_experts: int
    ) -> KeyedRates:
        """From `name.keys` and `name.rates` of a saved state.

        Raises:
            CheckpointError: They do not fit, or a key is there twice.
        """
        keys = take(arrays, f"{name}.keys", (-1, width), np.int16)
        rates = take(arrays, f"{name}.rates", (len(keys), num_experts))
        table = cls(keys, check_rates(f"{name}.rates", rates), np.ones(len(keys), np.int64))
        if len(table._rows) != len(keys):
            raise CheckpointError(f"predictor: got a key twice in {name}.keys")
        return table

    def look_up(self, keys: Array, behind: Array) -> Array:
        """Rates for keys `[N, W]`; `behind`, `[N, E]` or `[E]`, where a key is unknown."""
        if len(keys) == 1:  # live: one token
            owner, rows = np.zeros(1, np.int64), [self._rows.get(keys[0].tobytes(), -1)]
        else:
            distinct, owner = np.unique(keys, axis=0, return_inverse=True)
            rows = [self._rows.get(key.tobytes(), -1) for key in distinct]
        row = np.asarray(rows, np.int64)[owner.reshape(-1)]
        found = np.broadcast_to(behind, (len(keys), self.rates.shape[1])).copy()
        found[row >= 0] = self.rates[row[row >= 0]]
        return found

    @cached_property
    def _rows(self) -> dict[bytes, int]:
        return {key.tobytes(): row for row, key in enumerate(np.ascontiguousarray(self.keys))}
