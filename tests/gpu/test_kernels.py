"""The kernels on raw device pointers against fp64, and what must not change their bits."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest

from sluice.errors import ConfigError

from .device import SILU, Device, Values, cuda, emulated, from_bits, to_bits
from .layer import Layer, Shape, route

TYPES = [("BF16", "BF16"), ("F16", "F16"), ("F32", "F32"), ("BF16", "F32"), ("F16", "F32")]
GATES = ("silu", "gelu_tanh", "clamped_silu", "oai_swiglu", "relu", "relu2", "silu_only")
FEW = 16  # rows of an expert that the decode pair takes


def test_the_decode_pair_takes_what_these_tests_say() -> None:
    assert cuda().gemv_tokens == FEW


def gate_of(index: int) -> dict[str, Any]:
    kind = GATES[index % len(GATES)]
    return SILU | {"kind": kind, "limit": 1.5, "interleaved": index % 3 == 1}


def positions(layer: Layer, expert: int) -> range:
    return range(layer.offsets[expert], layer.offsets[expert + 1])


def check(layer: Layer, experts: Any, takes: Any, **options: Any) -> None:
    """Both products of each expert whose count is for these kernels; the others stay untouched."""
    s = layer.shape
    h = layer.gate_up(experts, **options)
    scratch = layer.down(experts, h, **options)
    values = from_bits(h, s.activations).astype(np.float64)
    for expert, count in enumerate(s.counts):
        here = list(positions(layer, expert))
        if not takes(count):
            untouched = h[here].view(np.uint8) == 0xFF
            assert untouched.all(), f"{s}: expert {expert} is not for these kernels"
            continue
        x = layer.hidden[[layer.token_of(p) for p in here]]
        close(values[here], *layer.exact_h(expert, x), f"{s}: h of expert {expert}")
        product, allowed = layer.exact_down(expert, values[here])
        close(scratch[layer.rows[here]], product, allowed, f"{s}: down of expert {expert}")


def close(got: Values, exact: Values, allowed: Values, what: str) -> None:
    error = np.abs(got.astype(np.float64) - exact)
    worst = float(np.nan_to_num(error / allowed, nan=np.inf).max()) if error.size else 0.0
    assert worst <= 1, f"{what}: {worst:.3g} times the error that rounding explains"


@pytest.mark.parametrize("types", TYPES, ids="-".join)
@pytest.mark.parametrize("tiles", [False, True])
def test_products_are_within_rounding_of_fp64(
    gpu: Device, types: tuple[str, str], tiles: bool
) -> None:
    counts = (70, 1, 0, 129) if tiles else (1, 3, 0, 16, 17, 9)
    for index, (hidden, intermediate) in enumerate(((72, 136), (264, 24), (776, 40))):
        shape = Shape(hidden, intermediate, counts, *types, biased=index % 2 == 0,
                      gate=gate_of(index + 2 * TYPES.index(types)))  # fmt: skip
        layer = Layer(gpu, shape, seed=index)
        everything = layer.list_of(range(len(counts)))
        if tiles:
            check(layer, everything, lambda count: count >= 2, tiles_from=2)
        else:
            check(layer, everything, lambda count: 1 <= count <= FEW)


@pytest.mark.parametrize("types", TYPES, ids="-".join)
@pytest.mark.parametrize("tiles", [False, True])
def test_products_of_small_integers_are_exact(
    gpu: Device, types: tuple[str, str], tiles: bool
) -> None:
    """Sums of halves are exact in any order: nearly every wrong index changes one."""
    for seed, (hidden, intermediate) in enumerate(((8, 40), (136, 16), (520, 8))):
        counts = (66, 17, 0, 5) if tiles else (16, 2, 0, 9)
        shape = Shape(hidden, intermediate, counts, *types, gate=SILU | {"kind": "relu"})
        layer = Layer(gpu, shape, seed, integers=True)
        everything = layer.list_of(range(4))
        option = {"tiles_from": 1 if tiles else 0}
        h = layer.gate_up(everything, **option)
        halves = layer.draw((layer.entries, intermediate), types[1], 1.0)
        scratch = layer.down(everything, to_bits(halves, types[1]), **option)
        for expert in range(4):
            here = list(positions(layer, expert))
            x = layer.hidden[[layer.token_of(p) for p in here]]
            exact = to_bits(layer.exact_h(expert, x)[0], types[1])
            assert np.array_equal(h[here], exact), f"{shape}: h of expert {expert}"
            product = layer.exact_down(expert, halves[here])[0].astype(np.float32)
            assert np.array_equal(scratch[layer.rows[here]], product), f"{shape}: {expert}"


# (hidden, intermediate) of Qwen3-30B-A3B, DeepSeek-V2-Lite, gpt-oss and Mixtral.
REAL_SHAPES = ((2048, 768), (2048, 1408), (2880, 2880), (4096, 14336))


@pytest.mark.skipif("emulated()", reason="hours on the emulation")
@pytest.mark.parametrize("shape", REAL_SHAPES, ids=str)
@pytest.mark.parametrize("types", TYPES[:3], ids="-".join)
def test_products_at_the_shapes_of_models(
    gpu: Device, shape: tuple[int, int], types: tuple[str, str]
) -> None:
    few = Layer(gpu, Shape(*shape, (1, 2, 16, 8), *types), seed=1)
    check(few, few.list_of(range(4)), lambda count: 1 <= count <= FEW)
    many = Layer(gpu, Shape(*shape, (64, 200), *types), seed=2)
    check(many, many.list_of(range(2)), lambda count: count > FEW, tiles_from=FEW + 1)


def bits(layer: Layer, experts: Any, **options: Any) -> tuple[bytes, bytes]:
    h = layer.gate_up(experts, **options)
    return h.tobytes(), layer.down(experts, h, **options).tobytes()


@pytest.mark.parametrize("types", TYPES, ids="-".join)
@pytest.mark.parametrize("tiles_from", [0, 1])
def test_bits_ignore_the_list_the_launch_and_the_gpu(
    gpu: Device, types: tuple[str, str], tiles_from: int
) -> None:
    for hidden, intermediate in ((1048, 24), (24, 1048)):
        layer = Layer(gpu, Shape(hidden, intermediate, (2, 16, 0, 7), *types, biased=True), 3)
        option = {"tiles_from": tiles_from}
        expected = bits(layer, layer.list_of(range(4)), **option)
        assert bits(layer, layer.list_of(range(4)), **option) == expected, "the same again"
        assert bits(layer, layer.list_of((3, 1, 2, 0)), **option) == expected, "the list reversed"
        assert bits(layer, layer.table(), **option) == expected, "by table"
        small = cuda().Gpu(0, num_multiprocessors=1, shared_bytes=99 * 1024)
        assert bits(layer, layer.list_of(range(4), gpu=small), **option) == expected, "another GPU"
        del small


def test_a_tokens_bits_ignore_the_tokens_beside_it(gpu: Device) -> None:
    for types, tiles_from in itertools.product(TYPES, (0, 1)):
        layer = Layer(gpu, Shape(264, 72, (16,), *types, top_k=1), 4)
        experts = layer.list_of((0,))
        h = layer.gate_up(experts, tiles_from=tiles_from)
        whole = layer.down(experts, h, tiles_from=tiles_from)
        for count in (1, 2, 8, 9):
            first = 16 - count
            layer._on_device[0].write(np.array([first, 16], dtype=np.int32))
            few = layer.gate_up(experts, tiles_from=tiles_from)
            rows = layer.down(experts, h, tiles_from=tiles_from)
            where = f"{types}, tiles from {tiles_from}, {count} tokens"
            assert np.array_equal(few[first:], h[first:]), f"{where}: h"
            entries = layer.rows[first:]
            assert np.array_equal(rows[entries], whole[entries]), f"{where}: down"
            others = layer.rows[:first]
            assert (few[:first].view(np.uint8) == 0xFF).all(), f"{where}: others' h"
            assert (rows[others].view(np.uint8) == 0xFF).all(), f"{where}: others' rows"


def test_routing_sorts_by_expert_and_leaves_out_what_is_none(gpu: Device) -> None:
    random = np.random.default_rng(5)
    sizes = [(1, 8, 128), (33, 4, 60), (200, 2, 8)]
    if not emulated():
        sizes += [(4096, 8, 128), (64, 8, 4096)]
    for (tokens, top_k, experts), dtype in itertools.product(sizes, ("BF16", "F16", "F32")):
        ids = random.integers(-1, experts + 1, (tokens, top_k))
        weights = random.standard_normal((tokens, top_k)) * (random.random((tokens, top_k)) > 0.1)
        offsets, rows = route(gpu, ids, weights, dtype, experts)
        rounded = from_bits(to_bits(weights, dtype), dtype)
        valid = ((ids >= 0) & (ids < experts) & (rounded != 0)).ravel()
        order = [np.nonzero(valid & (ids.ravel() == e))[0] for e in range(experts)]
        expected = np.concatenate([[0], np.cumsum([len(o) for o in order])])
        assert np.array_equal(offsets, expected), f"{tokens} x {top_k} of {experts}, {dtype}"
        assert np.array_equal(rows[: expected[-1]], np.concatenate(order))
        assert (rows[expected[-1] :] == -1).all(), "rows behind the last were written"


def test_combining_adds_in_k_order_with_one_rounding(gpu: Device) -> None:
    random = np.random.default_rng(6)
    kinds = ("F32", "BF16", "F16")
    for index, (dtype, out_dtype) in enumerate(itertools.product(kinds, kinds)):
        tokens, top_k, hidden, experts = 3, 1 + index % 5, (8, 1016, 1032)[index % 3], 4
        ids = random.integers(-1, experts + 1, (tokens, top_k))
        weights = random.standard_normal((tokens, top_k))
        weights[random.random(weights.shape) < 0.2] = 0
        weights = from_bits(to_bits(weights, dtype), dtype).astype(np.float64)
        rows = random.standard_normal((tokens * top_k, hidden)).astype(np.float32)
        valid = (ids >= 0) & (ids < experts) & (weights != 0)
        rows[~valid.ravel()] = np.nan  # nobody may read them
        out = gpu.empty((tokens, hidden), to_bits(np.zeros(1), out_dtype).dtype)
        given = (gpu.array(ids.astype(np.int64)), gpu.array(to_bits(weights, dtype)))
        scratch = gpu.array(rows)
        cuda().combine(tokens, top_k, hidden, experts, dtype, out_dtype, given[0].address,
                       given[1].address, scratch.address, out.address)  # fmt: skip
        total = np.zeros((tokens, hidden), dtype=np.float32)
        for k in range(top_k):
            chosen = valid[:, k]
            row = rows.reshape(tokens, top_k, hidden)[chosen, k].astype(np.float64)
            # A fused multiply-add: the product of two fp32 is exact in fp64, and so nearly is
            # the sum; where fp64 itself rounds, twice rounding could differ by one unit.
            total[chosen] = (weights[chosen, k, None] * row + total[chosen]).astype(np.float32)
        got, expected = out.read(), to_bits(total, out_dtype)
        if out_dtype == "F32":
            assert np.abs(got - expected).max() <= 2.0**-22 * (1 + np.abs(expected).max())
        else:
            same = np.mean(got == expected)
            assert same > 0.99, f"{dtype} weights, {out_dtype}: {same:.4f} of the values"


def test_a_chain_that_starts_early_gives_the_bits_of_one_that_waits(gpu: Device) -> None:
    rounds = 4 if emulated() else 300
    layer = Layer(gpu, Shape(264, 72, (2, 1, 3, 2), top_k=2), 7)
    everything = layer.list_of(range(4))
    h = layer.device.empty((layer.entries, 72), np.uint16)
    scratch = layer.device.empty((layer.entries, 264), np.float32)
    expected: bytes | None = None
    for round_ in range(rounds):
        early = round_ > 0
        everything.gate_up(
            layer.entries, layer.routed(), layer._hidden.address, h.address, early=early
        )
        everything.down(layer.entries, layer.routed(), h.address, scratch.address, early=early)
        if round_ in (0, rounds - 1):
            got = h.read().tobytes() + scratch.read().tobytes()
            expected = expected or got
            assert got == expected


def test_reading_adds_up_every_word_once(gpu: Device) -> None:
    random = np.random.default_rng(8)
    for nbytes in (16, 4096, 200_000, 16 if emulated() else 64 << 20):
        words = random.integers(0, 2**32, nbytes // 4, dtype=np.uint32)
        data = gpu.array(words)
        sums = gpu.empty((gpu.gpu.read_blocks(),), np.uint32)
        gpu.gpu.read_bandwidth(data.address, nbytes, sums.address)
        total = int(sums.read().astype(np.uint64).sum()) % 2**32
        assert total == int(words.astype(np.uint64).sum()) % 2**32, f"{nbytes} bytes"


def test_what_cannot_be_computed_is_refused_by_name(gpu: Device) -> None:
    layer = Layer(gpu, Shape(16, 8, (1,), top_k=1), 9)
    fields = layer.problem() | {"hidden": 12}
    odd = gpu.gpu.experts([(0, *layer.experts[0]["addresses"])], **fields)
    with pytest.raises(ConfigError, match="12"):
        odd.gate_up(1, layer.routed(), layer._hidden.address, layer._hidden.address)
    with pytest.raises(ConfigError, match="got 129, expected at most 128"):
        gpu.gpu.experts([(0, 0, 0, 0, 0)] * 129, **layer.problem())
    assert math.isfinite(float(from_bits(layer.gate_up(layer.list_of((0,))), "BF16").max()))
