"""An LRU per layer in slots of the device, with and without overlap, by sluice's own kernels."""

from __future__ import annotations

import ctypes
from collections import OrderedDict
from typing import Any

import torch

from baselines.layers.arm import GATE, LayerArm
from baselines.layers.block import PAGE, Block
from baselines.layers.gpu import OnDevice, place, wait_for
from sluice import _core
from sluice.tensors import DTYPE_NAMES


class LruLayers(LayerArm):
    """Per-layer LRU of E · share experts in slots of the device, loaded on a miss from pinned RAM.

    On demand: misses are copied on the compute stream and the host waits for them, then all is
    computed. With overlap: misses on a copy stream, each behind the last kernel that reads the slot
    it takes; residents are computed meanwhile, each miss when it is there, no host wait but for the
    ids. Nothing is copied back.
    """

    def __init__(
        self, mode: str, block: Block, scenario: dict[str, Any], share: float, *, overlap: bool
    ) -> None:
        super().__init__(mode, block, scenario, share)
        self.overlap = overlap
        self.capacity = max(scenario["model"]["top_k"], int(block.experts * share))
        self.requests = self.misses = 0

    def setup(self) -> None:
        block, model = self.block, self.scenario["model"]
        self.cuda: Any = _core._cuda  # type: ignore[attr-defined]
        self.gpu: Any = self.cuda.Gpu(0)
        self.tensors = OnDevice(self.gpu)
        # The same bytes as every arm's, pinned: copies of all experts read from here.
        self.host = self.gpu.allocate_pinned(block.bytes)
        ctypes.memmove(self.host.address, block.address, block.bytes)
        self.slot_bytes = -(-block.expert_bytes // PAGE) * PAGE
        slots = self.capacity * block.layers
        self.slab = self.gpu.allocate(slots * self.slot_bytes)
        self.resident: list[OrderedDict[int, int]] = [OrderedDict() for _ in range(block.layers)]
        self.free = [
            list(range(layer * self.capacity, (layer + 1) * self.capacity))
            for layer in range(block.layers)
        ]
        self.last_use: dict[int, int] = {}  # slot -> event behind its last reader
        entries = model["top_k"]
        wide = {"offsets": 4 * (block.experts + 1), "rows": 4 * entries,
                "h": entries * block.intermediate * block.dtype.itemsize,
                "scratch": entries * block.hidden * 4, "ids": 8 * entries}  # fmt: skip
        self.scratch = {name: self.gpu.allocate(nbytes) for name, nbytes in wide.items()}
        self.ids_host = self.gpu.allocate_pinned(8 * entries)
        name = DTYPE_NAMES[block.dtype]
        self.problem = {"weights_dtype": name, "activations": name, "hidden": block.hidden,
                        "intermediate": block.intermediate, "gate": GATE}  # fmt: skip

    def forward(
        self, layer: int, hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor
    ) -> torch.Tensor:
        block, gpu = self.block, self.gpu
        top_k = ids.shape[1]
        stream = 0
        if place() != "cpu":
            stream = torch.cuda.current_stream().cuda_stream
        out = torch.empty_like(hidden)
        at = {name: memory.address for name, memory in self.scratch.items()}
        ids_at, weights_at = self.tensors.address(ids), self.tensors.address(weights)
        hidden_at, out_at = self.tensors.address(hidden), self.tensors.address(out)
        gpu.read(self.ids_host.address, ids_at, 8 * top_k, stream)
        arrived = gpu.record(stream)
        wtype = DTYPE_NAMES[weights.dtype]
        self.cuda.route(1, top_k, block.experts, wtype, ids_at, weights_at, at["offsets"],
                        at["rows"], stream=stream)  # fmt: skip
        gpu.synchronize(arrived)
        gpu.release(arrived)
        found = (ctypes.c_int64 * top_k).from_address(self.ids_host.address)
        wanted = list(dict.fromkeys(found))
        routed = (at["offsets"], at["rows"], block.experts, top_k)

        def compute(experts: list[int]) -> None:
            entries = []
            for expert in experts:
                begin = self.slab.address + self.resident[layer][expert] * self.slot_bytes
                entries.append((expert, begin, begin + block.w13_bytes, 0, 0))
            listed = gpu.experts(entries, **self.problem)
            listed.gate_up(top_k, routed, hidden_at, at["h"], stream=stream)
            listed.down(top_k, routed, at["h"], at["scratch"], stream=stream, early=True)

        hits = [e for e in wanted if e in self.resident[layer]]
        misses = [e for e in wanted if e not in self.resident[layer]]
        self.requests += len(wanted)
        self.misses += len(misses)
        for expert in wanted:
            if expert in self.resident[layer]:
                self.resident[layer].move_to_end(expert)
        if self.overlap:
            self._with_overlap(layer, hits, misses, compute, stream)
        else:
            for expert in misses:
                self._copy(layer, expert, self._slot(layer, expert, wanted), stream)
            if misses:
                wait_for(gpu, stream)
            compute(wanted)
        kind = DTYPE_NAMES[hidden.dtype]
        self.cuda.combine(1, top_k, block.hidden, block.experts, wtype, kind, ids_at, weights_at,
                          at["scratch"], out_at, stream=stream)  # fmt: skip
        self.tensors.back(out, out_at, stream)
        return out

    def _with_overlap(
        self, layer: int, hits: list[int], misses: list[int], compute: Any, stream: int
    ) -> None:
        gpu = self.gpu
        copies = gpu.copy_stream
        ready: list[int] = []
        for expert in misses:
            slot = self._slot(layer, expert, hits + misses)
            if (used := self.last_use.pop(slot, None)) is not None:
                gpu.wait(copies, used)
                gpu.release(used)
            self._copy(layer, expert, slot, copies)
            ready.append(gpu.record(copies))
        if hits:
            compute(hits)
        for expert, event in zip(misses, ready, strict=True):
            gpu.wait(stream, event)
            gpu.release(event)
            compute([expert])
        for expert in hits + misses:
            slot = self.resident[layer][expert]
            if (used := self.last_use.pop(slot, None)) is not None:
                gpu.release(used)
            self.last_use[slot] = gpu.record(stream)

    def _slot(self, layer: int, expert: int, wanted: list[int]) -> int:
        """A slot for a missing expert: a free one, or that of the least recently used."""
        resident = self.resident[layer]
        if self.free[layer]:
            slot = self.free[layer].pop(0)
        else:
            victim = next(e for e in resident if e not in wanted)
            slot = resident.pop(victim)
        resident[expert] = slot
        return slot

    def _copy(self, layer: int, expert: int, slot: int, stream: int) -> None:
        w13, w2 = self.block.sections(layer, expert)
        target = self.slab.address + slot * self.slot_bytes
        self.gpu.copy(target, self.host.address + w13, self.block.w13_bytes, stream)
        self.gpu.copy(
            target + self.block.w13_bytes, self.host.address + w2, self.block.w2_bytes, stream
        )

    def counters(self) -> dict[str, Any]:
        moved = self.misses * self.block.expert_bytes
        return {
            "requests": self.requests,
            "hits": self.requests - self.misses,
            "late": 0,
            "misses": self.misses,
            "bytes_read": moved,
            "bytes_read_demand": moved,
        }

    def memory(self) -> dict[str, int]:
        granted = self.capacity * self.block.layers * self.slot_bytes
        used = sum(len(each) for each in self.resident) * self.slot_bytes
        return {"expert_bytes_granted": granted, "expert_bytes_used": used,
                "pinned_bytes": self.block.bytes}  # fmt: skip

    def config(self) -> dict[str, Any]:
        return {"mode": self.mode, "experts_per_layer": self.capacity, "overlap": self.overlap}

    def close(self) -> None:
        if getattr(self, "gpu", None) is None:
            return
        wait_for(self.gpu, 0)
        if place() != "cpu":
            torch.cuda.synchronize()
        for event in self.last_use.values():
            self.gpu.release(event)
        self.last_use = {}
        self.host = self.slab = self.ids_host = self.scratch = None
        self.tensors = self.gpu = None
