"""The real bodies of kernels/ptx.h against the definitions of the PTX manual, by one probe each.

On the emulation the same probes run on the emulated bodies: one text of definitions holds both.
"""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np
import pytest

from .device import Values, from_bits, to_bits

WARP = 32


def call(function: Any, *arguments: Any) -> None:
    said = function(*arguments)
    assert said is None, said.decode()


def pointer(values: Values) -> ctypes.c_void_p:
    return ctypes.c_void_p(values.ctypes.data)


def run(function: Any, given: Values, shape: tuple[int, ...], *before: int) -> Values:
    given = np.ascontiguousarray(given)
    out = np.zeros(shape, dtype=np.uint32)
    call(function, *before, pointer(given), pointer(out))
    return out


def multiply(library: Any, dtype: str, a: Values, b: Values, c: Values) -> Values:
    """a [16, 16] · b [16, 8] + c [16, 8] by one mma, fragments packed as the manual words them."""
    a_bits, b_bits = (to_bits(x, dtype).view(np.uint16) for x in (a, b))
    given = np.zeros((WARP, 10), dtype=np.uint32)
    for lane in range(WARP):
        group, thread = lane // 4, lane % 4
        for i in range(8):
            row = group if i < 2 or 4 <= i < 6 else group + 8
            column = thread * 2 + (i & 1) + (0 if i < 4 else 8)
            given[lane, i // 2] |= np.uint32(a_bits[row, column]) << np.uint32(16 * (i % 2))
        for i in range(4):
            row = thread * 2 + (i & 1) + (0 if i < 2 else 8)
            given[lane, 4 + i // 2] |= np.uint32(b_bits[row, group]) << np.uint32(16 * (i % 2))
            c_row, c_column = group + (0 if i < 2 else 8), thread * 2 + (i & 1)
            given[lane, 6 + i] = np.float32(c[c_row, c_column]).view(np.uint32)
    out = run(library.probe_mma, given, (WARP, 4), int(dtype == "F16")).view(np.float32)
    d = np.empty((16, 8), dtype=np.float32)
    for lane in range(WARP):
        for i in range(4):
            d[lane // 4 + (0 if i < 2 else 8), lane % 4 * 2 + (i & 1)] = out[lane, i]
    return d


@pytest.mark.parametrize("dtype", ["BF16", "F16"])
def test_mma_is_exact_on_small_integers(library: Any, dtype: str) -> None:
    random = np.random.default_rng(7)
    for _ in range(20):
        a, b = (random.integers(-7, 8, shape) for shape in ((16, 16), (16, 8)))
        c = random.integers(-100, 101, (16, 8))
        got = multiply(library, dtype, a, b, c)
        assert np.array_equal(got, a @ b + c), f"mma of {dtype} on small integers"


@pytest.mark.parametrize("dtype", ["BF16", "F16"])
def test_mma_places_every_element_of_each_operand(library: Any, dtype: str) -> None:
    """One nonzero product at a time: a permutation of k that hides in sums is seen here."""
    for k in range(16):
        a, b = np.zeros((16, 16)), np.zeros((16, 8))
        a[:, k], b[k, :] = np.arange(1, 17), np.arange(1, 9)
        got = multiply(library, dtype, a, b, np.zeros((16, 8)))
        assert np.array_equal(got, np.outer(a[:, k], b[k, :])), f"mma of {dtype}, k {k}"


@pytest.mark.parametrize("dtype", ["BF16", "F16"])
def test_mma_stays_within_its_rounding_on_reals(library: Any, dtype: str) -> None:
    random = np.random.default_rng(8)
    for _ in range(20):
        a, b = (
            from_bits(to_bits(random.standard_normal(shape), dtype), dtype).astype(np.float64)
            for shape in ((16, 16), (16, 8))
        )
        c = random.standard_normal((16, 8)).astype(np.float32).astype(np.float64)
        got = multiply(library, dtype, a, b, c)
        # 32 roundings at most, each of half a unit, or a whole one where it truncates.
        allowed = 32 * 2.0**-23 * (np.abs(a) @ np.abs(b) + np.abs(c))
        assert (np.abs(got - (a @ b + c)) <= allowed).all(), f"mma of {dtype} on reals"


@pytest.mark.parametrize("transposed", [False, True])
def test_ldmatrix_gives_each_lane_its_words(library: Any, transposed: bool) -> None:
    elements = np.random.default_rng(9).integers(0, 2**16, (4, 8, 8)).astype(np.uint16)
    got = run(library.probe_ldmatrix, elements, (WARP, 4), int(transposed))
    got = got.view(np.uint16).reshape(WARP, 4, 2)
    for lane in range(WARP):
        group, thread = lane // 4, lane % 4
        for matrix in range(4):
            pair = elements[matrix]
            pair = pair.T if transposed else pair
            expected = pair[group, 2 * thread : 2 * thread + 2]
            assert np.array_equal(got[lane, matrix], expected), f"lane {lane}, matrix {matrix}"


def test_load_stream_gives_sixteen_bytes_in_their_order(library: Any) -> None:
    words = np.random.default_rng(10).integers(0, 2**32, (64, 4), dtype=np.uint32)
    assert np.array_equal(run(library.probe_load_stream, words, (64, 4)), words)


def test_cp_async_copies_what_it_is_told_and_fills_with_zeros(library: Any) -> None:
    words = np.random.default_rng(11).integers(0, 2**32, (17, 4), dtype=np.uint32)
    got = run(library.probe_cp_async, words, (2, 17, 4)).view(np.uint8)
    given = words.view(np.uint8)
    for count in range(17):
        expected = given[count].copy()
        expected[count:] = 0
        assert np.array_equal(got[0, count], expected), f"{count} bytes of 16"
    # The second group, read by other threads behind a barrier: 16 - t was copied by 16 - t.
    assert np.array_equal(got[1], given)


@pytest.mark.parametrize("system", [False, True])
def test_what_is_released_is_seen_by_who_acquires(library: Any, system: bool) -> None:
    count = 20 if emulated_library(library) else 10_000
    out = np.zeros(4, dtype=np.uint32)
    call(library.probe_messages, int(system), count, pointer(out))
    assert out[0] == 0, f"{out[0]} of {count} messages came torn"
    assert (out[1], out[2], out[3]) == (count, count, 3 * count + 1)


def emulated_library(library: Any) -> bool:
    return library.semantics_runtime() == b"emulated"


@pytest.mark.parametrize("triggers_first", [False, True])
@pytest.mark.parametrize("event_after", [-1, 1])
def test_a_chain_of_dependent_launches_waits_for_what_lies_ahead(
    library: Any, triggers_first: bool, event_after: int, record_property: Any
) -> None:
    links, delay_ns = 6, 0 if emulated_library(library) else 200_000
    out = np.zeros(16 + 4 * links, dtype=np.uint32)
    call(library.probe_chain, links, delay_ns, int(triggers_first), event_after, pointer(out))
    assert out[: links + 1].tolist() == list(range(links + 1)), "a link read before the one ahead"
    times = out[16:].view(np.uint64).reshape(links, 2).astype(np.int64)
    early = [bool(times[i + 1, 0] < times[i, 1]) for i in range(links - 1)]
    # Whether the hardware starts a link early is its own affair; where it did goes into the report.
    record_property("links_that_began_early", f"{early}")


@pytest.mark.parametrize("width", [32, 16, 8, 4])
def test_shuffles_stay_in_their_segments(library: Any, width: int) -> None:
    values = np.random.default_rng(12).integers(0, 2**32, WARP, dtype=np.uint32)
    got = run(library.probe_shuffle, values, (WARP, 4), width)
    for lane in range(WARP):
        first = lane // width * width
        at = lane - first
        across = lane ^ 5
        expected = [
            values[first + (lane + 3) % width],
            values[lane - 2] if at >= 2 else values[lane],
            values[lane + 2] if at + 2 < width else values[lane],
            # From a segment below one reads, from one above one keeps one's own.
            values[across] if across < first + width else values[lane],
        ]
        assert got[lane].tolist() == expected, f"lane {lane}, width {width}"


@pytest.mark.parametrize("least", [0, 60, 200])
def test_votes_count_every_lane(library: Any, least: int) -> None:
    values = np.random.default_rng(13).integers(least, least + 90, WARP, dtype=np.uint32)
    got = run(library.probe_vote, values, (WARP, 3))
    ballot = sum(int(v % 2) << lane for lane, v in enumerate(values))
    expected = [ballot, int((values > 100).any()), int((values < 100).all())]
    assert all(row.tolist() == expected for row in got), f"got {got[0]}, expected {expected}"
