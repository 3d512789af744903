"""The GPU's decode pair against a read loop and a copy over the same memory, in alternation.

One layer is `experts_per_call` experts with `tokens` rows each, gate_up and down; a sample goes
through so many layers that no cache holds them, in one captured graph, so that the host's launches
are not what is timed. `achieved` is the kernels' rate over the read loop's of the same round; a
copy's rate counts bytes read and written.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from baselines.layers.arm import GATE
from baselines.layers.gpu import OnDevice, kind_of_cuda, place, wait_for
from checkpoints import DTYPES
from harness import alternate
from micro.read_loop import Results, median_ratio, rate_row
from sluice import _core
from sluice.tensors import DTYPE_NAMES


class Layers:
    """Experts one behind the other in device memory, in groups of a layer each."""

    def __init__(self, scenario: dict[str, Any]) -> None:
        shape, work = scenario["model"], scenario["workload"]
        self.hidden, self.intermediate = shape["hidden"], shape["intermediate"]
        self.dtype = DTYPES[shape["dtype"]]
        self.per_call = work["experts_per_call"]
        matrix = self.hidden * self.intermediate * self.dtype.itemsize
        self.w13_bytes, self.expert_bytes = 2 * matrix, 3 * matrix
        self.layer_bytes = self.per_call * self.expert_bytes
        self.count = max(1, -(-work["working_set_bytes"] // self.layer_bytes))
        self.bytes = self.count * self.layer_bytes
        self.gpu: Any = _core._cuda.Gpu(0)  # type: ignore[attr-defined]
        self.memory = self.gpu.allocate(self.bytes)
        self._fill(shape.get("seed", 1))

    def _fill(self, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        tile = torch.randn(min(self.bytes // 2, 1 << 24), generator=generator)
        tile = (tile / self.hidden**0.5).to(self.dtype)
        pinned = self.gpu.allocate_pinned(tile.nbytes)
        host = torch.frombuffer(memory_at(pinned.address, tile.nbytes), dtype=self.dtype)
        host.copy_(tile)
        for at in range(0, self.bytes, tile.nbytes):
            count = min(tile.nbytes, self.bytes - at)
            self.gpu.copy(self.memory.address + at, pinned.address, count, 0)
        wait_for(self.gpu, 0)

    def lists(self) -> list[Any]:
        """One prepared list of experts per layer."""
        name = DTYPE_NAMES[self.dtype]
        found = []
        for layer in range(self.count):
            begin = self.memory.address + layer * self.layer_bytes
            entries = [
                (n, begin + n * self.expert_bytes, begin + n * self.expert_bytes + self.w13_bytes,
                 0, 0)
                for n in range(self.per_call)
            ]  # fmt: skip
            found.append(
                self.gpu.experts(entries, weights_dtype=name, activations=name, gate=GATE,
                                 hidden=self.hidden, intermediate=self.intermediate)
            )  # fmt: skip
        return found


def memory_at(address: int, nbytes: int) -> Any:
    import ctypes

    return (ctypes.c_char * nbytes).from_address(address)


class Clock:
    """Seconds of work on a stream: replays of one captured graph between two events of a GPU."""

    def __init__(self, launch: Callable[[int], None], gpu: Any, repeats: int) -> None:
        self.launch, self.gpu, self.repeats = launch, gpu, repeats
        self.graph: Any = None
        if place() != "cpu":
            launch(torch.cuda.current_stream().cuda_stream)  # opt-ins and loading come first
            torch.cuda.synchronize()
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph):
                launch(torch.cuda.current_stream().cuda_stream)

    def seconds(self) -> float:
        if self.graph is None:
            began = time.perf_counter()
            self.launch(0)
            wait_for(self.gpu, 0)
            return time.perf_counter() - began
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for _ in range(self.repeats):
            self.graph.replay()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3 / self.repeats


def pair(layers: Layers, tokens: int, kept: list[Any]) -> Callable[[int], None]:
    """Launches gate_up and down of every layer on a stream."""
    entries = layers.per_call * tokens
    # Expert e has rows e · tokens …: token t's k-th expert is k, in routed order.
    offsets = torch.arange(0, entries + 1, tokens, dtype=torch.int32)
    rows = torch.arange(entries, dtype=torch.int32).view(tokens, layers.per_call).T.contiguous()
    hidden = torch.randn(tokens, layers.hidden).to(layers.dtype)
    on_device = OnDevice(layers.gpu)
    given = [tensor.to(place()) for tensor in (offsets, rows.flatten(), hidden)]
    addresses = [on_device.address(tensor) for tensor in given]
    h = layers.gpu.allocate(entries * layers.intermediate * layers.dtype.itemsize)
    scratch = layers.gpu.allocate(entries * layers.hidden * 4)
    kept += [given, on_device, h, scratch]
    routed = (addresses[0], addresses[1], layers.per_call, layers.per_call)
    lists = layers.lists()

    def launch(stream: int) -> None:
        for number, experts in enumerate(lists):
            experts.gate_up(
                entries, routed, addresses[2], h.address, stream=stream, early=number > 0
            )
            experts.down(entries, routed, h.address, scratch.address, stream=stream, early=True)

    return launch


def run(scenario: dict[str, Any]) -> list[dict[str, Any]]:
    work = scenario["workload"]
    layers = Layers(scenario)
    sums = layers.gpu.allocate(4 * layers.gpu.read_blocks())
    kept: list[Any] = [sums]
    repeats = work.get("replays", 1)

    def read(stream: int) -> None:
        layers.gpu.read_bandwidth(layers.memory.address, layers.bytes, sums.address, stream=stream)

    clocks = {"read-loop": Clock(read, layers.gpu, repeats)}
    moved = {"read-loop": layers.bytes}
    if kind_of_cuda() == "runtime":
        half = layers.bytes // 2
        source = torch.empty(half, dtype=torch.uint8, device=place()).zero_()
        target = torch.empty_like(source)
        clocks["copy"] = Clock(lambda _stream: target.copy_(source), layers.gpu, repeats)
        moved["copy"] = 2 * half
    rows: list[dict[str, Any]] = []
    for tokens in work["tokens"]:
        clocks["decode-pair"] = Clock(pair(layers, tokens, kept), layers.gpu, repeats)
        moved["decode-pair"] = layers.bytes
        samplers = {
            name: lambda _index, name=name: moved[name] / clocks[name].seconds() for name in clocks
        }
        results = alternate(scenario, samplers)
        rows += rows_of(scenario, layers, tokens, results)
    return rows


def rows_of(
    scenario: dict[str, Any], layers: Layers, tokens: int, results: Results
) -> list[dict[str, Any]]:
    rows = []
    for name in results:
        limit: dict[str, Any] = {}
        if "copy" in results:
            limit["copy_bytes_s"] = statistics.median(results["copy"][0])
            limit["achieved_of_copy"] = median_ratio(results, name, "copy")
        rows.append(
            rate_row(
                scenario,
                name,
                results,
                tokens=tokens,
                working_set_bytes=layers.bytes,
                correct="tolerance (held against fp64 in tests/gpu)",
                config={
                    "hidden": layers.hidden,
                    "intermediate": layers.intermediate,
                    "dtype": scenario["model"]["dtype"],
                    "experts_per_call": layers.per_call,
                    "layer_bytes": layers.layer_bytes,
                    "clock": "events around replays of a graph" if place() != "cpu" else "host",
                },
                limit=limit,
            )
        )
    return rows
