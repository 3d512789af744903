"""fMoE's store of expert maps: bounded, searched by cosine, the most redundant map replaced.

Source: 2502.05370. A map is the router's probabilities of all layers for one token. A key stands
for what the token follows, by which a map is found before its own routes are known.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

_BLOCK = 64
_DIGITS = 5  # equal to rounding means equal: the older map wins, on every path


class MapStore:
    """Up to `capacity` maps and their keys.

    Args:
        capacity: C.
        key_share: How much the keys' likeness weighs against the maps' when one has to go.
        maps: float32 `[n, S, E]`, n at most C.
        keys: float32 `[n, Q]`, of length 1 or 0.
    """

    def __init__(self, capacity: int, key_share: float, maps: Array, keys: Array) -> None:
        self.capacity, self.key_share = capacity, key_share
        self._held = len(maps)
        self._maps = np.zeros((capacity, *maps.shape[1:]), np.float32)
        self._keys = np.zeros((capacity, keys.shape[1]), np.float32)
        self._lengths = np.zeros((capacity, maps.shape[1] + 1), np.float32)
        self._put(np.arange(len(maps)), maps, keys)

    def __len__(self) -> int:
        return self._held

    @property
    def maps(self) -> Array:
        """float32 `[n, S, E]`."""
        return self._maps[: self._held]

    @property
    def keys(self) -> Array:
        """float32 `[n, Q]`."""
        return self._keys[: self._held]

    def copy(self) -> MapStore:
        """A store of its own with the same content."""
        return MapStore(self.capacity, self.key_share, self.maps, self.keys)

    def insert(self, maps: Array, keys: Array) -> None:
        """Adds maps in order; in a full store each takes the place of the one most like it."""
        free = min(self.capacity - self._held, len(maps))
        self._put(np.arange(self._held, self._held + free), maps[:free], keys[:free])
        self._held += free
        for start in range(free, len(maps), _BLOCK):
            self._replace(maps[start : start + _BLOCK], keys[start : start + _BLOCK])

    def nearest_key(self, keys: Array) -> tuple[Array, Array]:
        """Index and cosine of the best map for keys `[N, Q]`; cosine 0 for a key of length 0."""
        return _best(keys @ self.keys.T)

    def dots(self, layer_maps: Array, layer: int) -> Array:
        """One layer's part of the products with every stored map: `[N, E]` → `[N, n]`."""
        return layer_maps @ self.maps[:, layer].T

    def nearest_path(self, dots: Array, lengths: Array, layers: int) -> tuple[Array, Array]:
        """Index and cosine of the best map for the first `layers` layers.

        Args:
            dots: float32 `[N, n]`, the sum of `dots` over those layers.
            lengths: float32 `[N]` of the first layers of the maps asked for.
            layers: At least 1.
        """
        both = lengths[:, None] * self._lengths[: self._held, layers]
        return _best(dots / np.maximum(both, 1e-9))

    def _put(self, places: Array, maps: Array, keys: Array) -> None:
        self._maps[places], self._keys[places] = maps, keys
        self._lengths[places] = prefix_lengths(maps)

    def _replace(self, maps: Array, keys: Array) -> None:
        mine, others = self._signature(maps, keys), self._signature(self.maps, self.keys)
        like, among = mine @ others.T, mine @ mine.T
        for row in range(len(maps)):
            place = int(_best(like[row : row + 1])[0][0])
            self._put(np.array([place]), maps[row : row + 1], keys[row : row + 1])
            like[:, place] = among[:, row]

    def _signature(self, maps: Array, keys: Array) -> Array:
        """Rows whose products are `share sem + (1 - share) traj`."""
        flat = maps.reshape(len(maps), -1)
        flat = flat / np.maximum(np.linalg.norm(flat, axis=1, keepdims=True), 1e-9)
        share = self.key_share
        return np.hstack([np.sqrt(share) * keys, np.sqrt(1 - share) * flat]).astype(np.float32)


def prefix_lengths(maps: Array) -> Array:
    """Lengths of the first 0 to S layers of maps `[N, S, E]`: float32 `[N, S + 1]`."""
    squares = np.cumsum(np.square(maps).sum(-1), axis=-1)
    return np.sqrt(np.concatenate([np.zeros((len(maps), 1)), squares], axis=1)).astype(np.float32)


def unit(vectors: Array) -> Array:
    """Rows `[N, Q]` brought to length 1; those of length 0 stay."""
    length = np.linalg.norm(vectors, axis=1, keepdims=True)
    return (vectors / np.maximum(length, 1e-9)).astype(np.float32)


def _best(cosines: Array) -> tuple[Array, Array]:
    rounded = np.round(cosines, _DIGITS)
    best = rounded.argmax(axis=1)
    return best, np.clip(rounded[np.arange(len(best)), best], 0, 1)
