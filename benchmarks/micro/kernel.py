"""The few-token kernel against a read loop over the same memory, in alternation."""

import time
from typing import Any

import torch

from harness import alternate, row
from machine import last_level_cache_bytes


def run(scenario: dict[str, Any]) -> list[dict[str, Any]]:
    from sluice import _core

    work = scenario["workload"]
    shape = scenario["model"]
    width, inter, dtype = shape["hidden"], shape["intermediate"], shape["dtype"]
    name = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}[dtype]
    size = 4 if dtype == "float32" else 2
    expert_bytes = 3 * width * inter * size
    count = max(2, work["working_set_llc"] * last_level_cache_bytes() // expert_bytes)
    memory = torch.empty(count * expert_bytes + (4 << 20), dtype=torch.uint8)
    base = (memory.data_ptr() + (2 << 20) - 1) // (2 << 20) * (2 << 20)
    start = base - memory.data_ptr()
    block = (torch.randn(1 << 20) * 0.05).to(getattr(torch, dtype)).view(torch.uint8)
    for begin in range(start, start + count * expert_bytes, block.numel()):
        end = min(begin + block.numel(), start + count * expert_bytes)
        memory[begin:end] = block[: end - begin]
    gate = {"kind": "silu", "interleaved": False, "alpha": 0.0, "limit": 0.0}
    rows: list[dict[str, Any]] = []
    for tokens in work["tokens"]:
        inputs, outputs = torch.randn(tokens, width), torch.empty(tokens, width)

        def decode(_index: int, tokens: int = tokens, x: Any = inputs, y: Any = outputs) -> float:
            begin = time.perf_counter()
            for expert in range(count):
                w13 = base + expert * expert_bytes
                _core.expert_decode(
                    "",
                    name,
                    name,
                    width,
                    inter,
                    gate,
                    w13,
                    w13 + 2 * width * inter * size,
                    0,
                    0,
                    x.data_ptr(),
                    y.data_ptr(),
                    tokens,
                )
            return count * expert_bytes / (time.perf_counter() - begin)

        def read(_index: int) -> float:
            return _core.read_bandwidth(base, count * expert_bytes, 1)

        results = alternate(scenario, {"read-loop": read, "expert-decode": decode})
        loop = results["read-loop"][0]
        for mode, (samples, stop) in results.items():
            ratios = sorted(a / b for a, b in zip(samples, loop, strict=True))
            limit = {"read_loop_bytes_s": sorted(loop)[len(loop) // 2]}
            limit["achieved"] = ratios[len(ratios) // 2]
            rows.append(
                row(
                    scenario,
                    mode=mode,
                    metric=f"bytes_s_{tokens}_tokens",
                    unit="B/s",
                    better="higher",
                    state="resident",
                    samples=samples,
                    stop=stop,
                    correct="bitwise (tiers are compared in the tests)",
                    config=dict(shape),
                    data={"working_set_bytes": count * expert_bytes, "tokens": tokens},
                    limit=limit,
                )
            )
    return rows
