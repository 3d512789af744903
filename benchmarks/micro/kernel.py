"""The few-token kernel against a read loop over the same memory, in alternation.

One call computes `experts_per_call` experts, as a layer of a decoded token does.
"""

import time
from collections.abc import Callable
from typing import Any

import torch

from harness import alternate
from machine import last_level_cache_bytes
from micro.read_loop import rate_row
from sluice import _core, ops

NAMES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}
HUGE_PAGE = 2 << 20


class Weights:
    """Experts one behind the other, from a huge page's boundary on; plain gated layout."""

    def __init__(self, shape: dict[str, Any], working_set_bytes: int, per_call: int) -> None:
        matrix = shape["hidden"] * shape["intermediate"]
        kind = getattr(torch, shape["dtype"])
        self.expert_bytes = 3 * matrix * kind.itemsize
        self.calls = max(1, -(-working_set_bytes // (self.expert_bytes * per_call)))
        self.bytes = self.calls * per_call * self.expert_bytes
        self.memory = torch.empty(self.bytes + 2 * HUGE_PAGE, dtype=torch.uint8)
        self.base = -(-self.memory.data_ptr() // HUGE_PAGE) * HUGE_PAGE
        start = self.base - self.memory.data_ptr()
        block = (torch.randn(1 << 20) * 0.05).to(kind).view(torch.uint8)
        for begin in range(start, start + self.bytes, block.numel()):
            end = min(begin + block.numel(), start + self.bytes)
            self.memory[begin:end] = block[: end - begin]
        every = range(self.base, self.base + self.bytes, self.expert_bytes)
        down = 2 * matrix * kind.itemsize
        experts = [(w13, w13 + down, 0, 0) for w13 in every]
        self.groups = [experts[at : at + per_call] for at in range(0, len(experts), per_call)]


def decode(
    weights: Weights, shape: dict[str, Any], tokens: int, parallel: Any
) -> Callable[[int], float]:
    """Bytes/s of one pass over every expert, `tokens` tokens each."""
    width, name = shape["hidden"], NAMES[shape["dtype"]]
    gate = {"kind": "silu", "interleaved": False, "alpha": 0.0, "limit": 0.0}
    x = torch.randn(tokens, width)
    y = torch.empty(len(weights.groups[0]), tokens, width)

    def one(_index: int) -> float:
        begin = time.perf_counter()
        for group in weights.groups:
            _core.expert_decode(
                parallel,
                "",
                name,
                name,
                width,
                shape["intermediate"],
                gate,
                group,
                x.data_ptr(),
                y.data_ptr(),
                tokens,
            )
        return weights.bytes / (time.perf_counter() - begin)

    return one


def run(scenario: dict[str, Any]) -> list[dict[str, Any]]:
    ops.load()  # torch's pool is the default from here on
    work, shape = scenario["workload"], scenario["model"]
    per_call = work["experts_per_call"]
    weights = Weights(shape, work["working_set_llc"] * last_level_cache_bytes(), per_call)
    pools = {"torch-pool": _core.Parallel(), "own-pool": _core.Parallel("own")}

    def read(_index: int) -> float:
        return _core.read_bandwidth(pools["torch-pool"], weights.base, weights.bytes, 1)

    rows: list[dict[str, Any]] = []
    for tokens in work["tokens"]:
        samplers: dict[str, Callable[[int], float]] = {"read-loop": read}
        for pool, parallel in pools.items():
            samplers[f"expert-decode:{pool}"] = decode(weights, shape, tokens, parallel)
        results = alternate(scenario, samplers)
        rows += [
            rate_row(
                scenario,
                mode,
                results,
                tokens=tokens,
                working_set_bytes=weights.bytes,
                correct="bitwise (tiers are compared in the tests)",
                config={**shape, "experts_per_call": per_call},
            )
            for mode in results
        ]
    return rows
