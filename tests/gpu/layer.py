"""A layer of experts on both sides, and how far a kernel may lie from exact arithmetic.

Tolerances are those of tests/emulation/kernels/layer.h and experts_check.h, in numpy.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from .device import SILU, Array, Device, Values, cuda, from_bits, storage, to_bits


@dataclass
class Shape:
    """Letters as in kernels/README.md; `counts` are the rows that each expert gets."""

    hidden: int
    intermediate: int
    counts: Sequence[int]
    weights: str = "BF16"
    activations: str = "BF16"
    top_k: int = 2
    biased: bool = False
    gate: dict[str, Any] = field(default_factory=lambda: dict(SILU))

    @property
    def gated(self) -> bool:
        return self.gate["kind"] not in {"relu2", "silu_only", "gelu_only", "relu_only"}

    @property
    def w13_rows(self) -> int:
        return (2 if self.gated else 1) * self.intermediate


class Layer:
    """Experts, a call's rows by expert, and inputs; `integers` make every sum exact in fp32."""

    def __init__(self, device: Device, shape: Shape, seed: int, *, integers: bool = False) -> None:
        self.device, self.shape, self.integers = device, shape, integers
        self.random = np.random.default_rng(seed)
        self.experts = [self._expert() for _ in shape.counts]
        self.lists: list[Array] = []
        ids = np.repeat(np.arange(len(shape.counts)), shape.counts)
        ids = np.concatenate([ids, np.full(-len(ids) % shape.top_k, -1)])
        self.ids = self.random.permutation(ids).astype(np.int64)
        self.entries = len(self.ids)
        self.tokens = self.entries // shape.top_k
        self.hidden = self.draw((self.tokens, shape.hidden), shape.activations, 1.0)
        self.offsets = np.concatenate([[0], np.cumsum(shape.counts)]).astype(np.int32)
        self.rows = np.concatenate(
            [np.nonzero(self.ids == e)[0] for e in range(len(shape.counts))]
        ).astype(np.int32)
        self._on_device = [device.array(self.offsets), device.array(self.rows)]
        self._hidden = device.array(to_bits(self.hidden, shape.activations))

    def draw(self, shape: tuple[int, ...], dtype: str, scale: float) -> Values:
        if self.integers:
            return self.random.integers(-2, 3, shape) * 0.5
        values = self.random.standard_normal(shape, dtype=np.float32) * np.float32(scale)
        return from_bits(to_bits(values, dtype), dtype).astype(np.float64)

    def _expert(self) -> dict[str, Any]:
        s = self.shape
        host: dict[str, Any] = {
            "w13": self.draw((s.w13_rows, s.hidden), s.weights, s.hidden**-0.5),
            "w2": self.draw((s.hidden, s.intermediate), s.weights, s.intermediate**-0.5),
            "b13": np.zeros(s.w13_rows),
            "b2": np.zeros(s.hidden),
        }
        if s.biased:
            host["b13"] = self.draw((s.w13_rows,), "F32", 1.0)
            host["b2"] = self.draw((s.hidden,), "F32", 1.0)
        placed = {k: self.device.array(to_bits(host[k], s.weights)) for k in ("w13", "w2")}
        if s.biased:
            placed |= {k: self.device.array(to_bits(host[k], "F32")) for k in ("b13", "b2")}
        host["arrays"] = placed
        host["addresses"] = tuple(
            placed[k].address if k in placed else 0 for k in ("w13", "w2", "b13", "b2")
        )
        return host

    def problem(self) -> dict[str, Any]:
        s = self.shape
        return {"weights_dtype": s.weights, "activations": s.activations, "hidden": s.hidden,
                "intermediate": s.intermediate, "gate": s.gate}  # fmt: skip

    def list_of(self, experts: Sequence[int], *, gpu: Any = None) -> Any:
        """These experts by value."""
        entries = [(e, *self.experts[e]["addresses"]) for e in experts]
        return (gpu or self.device.gpu).experts(entries, **self.problem())

    def table(self) -> Any:
        """All of them, in device memory."""
        addresses = np.array([e["addresses"] for e in self.experts], dtype=np.uint64)
        self.lists.append(self.device.array(addresses))
        count = len(self.experts)
        return self.device.gpu.table(self.lists[-1].address, count, **self.problem())

    def routed(self) -> tuple[int, int, int, int]:
        offsets, rows = self._on_device
        return offsets.address, rows.address, len(self.experts), self.shape.top_k

    def gate_up(self, experts: Any, **options: Any) -> Values:
        """h [T · K, I] by routed position, bits; rows that nobody wrote are all ones."""
        s = self.shape
        out = self.device.empty((self.entries, s.intermediate), storage(s.activations))
        experts.gate_up(self.entries, self.routed(), self._hidden.address, out.address, **options)
        return out.read()

    def down(self, experts: Any, h: Values, **options: Any) -> Values:
        """[T · K, H] fp32 by entry."""
        given = self.device.array(h)
        out = self.device.empty((self.entries, self.shape.hidden), np.float32)
        experts.down(self.entries, self.routed(), given.address, out.address, **options)
        return out.read()

    # ---- exact values, and what may lie between ----

    def token_of(self, position: int) -> int:
        return int(self.rows[position]) // self.shape.top_k

    def expert_of(self, position: int) -> int:
        return int(np.searchsorted(self.offsets, position, side="right")) - 1

    def exact_h(self, expert: int, x: Values) -> tuple[Values, Values]:
        """Rows x [n, H] through w13 and the gate in fp64, and the error allowed at each value."""
        s, host = self.shape, self.experts[expert]
        total = x @ host["w13"].T + host["b13"]
        terms = np.abs(x) @ np.abs(host["w13"]).T + np.abs(host["b13"])
        slack = sum_tolerance(s.hidden, terms)
        if not s.gated:
            g = u = total
            dg = du = slack
        elif s.gate["interleaved"]:
            g, u, dg, du = total[:, ::2], total[:, 1::2], slack[:, ::2], slack[:, 1::2]
        else:
            half = s.intermediate
            g, u, dg, du = total[:, :half], total[:, half:], slack[:, :half], slack[:, half:]
        exact = gate(s.gate, g, u)
        spread = np.zeros_like(exact)
        for a in (-dg, 0 * dg, dg):
            for b in (-du, 0 * du, du):
                spread = np.maximum(spread, np.abs(gate(s.gate, g + a, u + b) - exact))
        own = 8 * 2.0**-24 * (1 + np.abs(g)) * (1 + np.abs(u))
        return exact, spread + own + half_ulp(s.activations) * np.abs(exact)

    def exact_down(self, expert: int, h: Values) -> tuple[Values, Values]:
        host = self.experts[expert]
        total = h @ host["w2"].T + host["b2"]
        terms = np.abs(h) @ np.abs(host["w2"]).T + np.abs(host["b2"])
        return total, sum_tolerance(self.shape.intermediate, terms) + 1e-30


def sum_tolerance(columns: int, magnitude: Values) -> Values:
    """How far a sum of `columns` products, kept in fp32 in any order, may be from the exact one."""
    return 2.0**-24 * magnitude * (4 + 2 * math.sqrt(columns) + columns / 64)


def half_ulp(dtype: str) -> float:
    return {"F32": 2.0**-24, "F16": 2.0**-11, "BF16": 2.0**-8}[dtype]


def gate(spec: dict[str, Any], g: Values, u: Values) -> Values:
    """The gates of kernels/gate.h in fp64; without a gate both arguments are the row."""
    limit, alpha = spec["limit"], spec["alpha"]
    sigmoid = lambda x: 1 / (1 + np.exp(-np.clip(x, -700, 700)))  # noqa: E731
    kind = spec["kind"]
    if kind == "silu":
        return g * sigmoid(g) * u
    if kind == "clamped_silu":
        g = np.minimum(g, limit)
        return g * sigmoid(g) * np.clip(u, -limit, limit)
    if kind == "oai_swiglu":
        g = np.minimum(g, limit)
        return g * sigmoid(alpha * g) * (np.clip(u, -limit, limit) + 1)
    if kind == "gelu_tanh":
        return 0.5 * g * (1 + np.tanh(math.sqrt(2 / math.pi) * (g + 0.044715 * g**3))) * u
    if kind == "relu":
        return np.maximum(g, 0) * u
    if kind == "relu2":
        return np.maximum(u, 0) ** 2
    if kind == "silu_only":
        return u * sigmoid(u)
    raise AssertionError(f"no reference for the gate {kind}")


def route(device: Device, ids: Values, weights: Values, dtype: str, experts: int) -> Any:
    """(offsets, rows) of `launch_route`; what it leaves alone is -1."""
    tokens, top_k = ids.shape
    given = [device.array(ids.astype(np.int64)), device.array(to_bits(weights, dtype))]
    offsets, rows = (device.empty((n,), np.int32) for n in (experts + 1, max(1, ids.size)))
    cuda().route(tokens, top_k, experts, dtype, given[0].address, given[1].address,
                 offsets.address, rows.address)  # fmt: skip
    return offsets.read(), rows.read()
