"""Arms of a stack of MoE layers beside a GPU: no attention, nothing dense, replayed routes.

All but accelerate's compute with the same kernels, so that outputs are equal bit for bit; only who
stays and what overlaps differs. On the emulation of the tests torch's CPU stands for the device.
"""

from __future__ import annotations

import ctypes
from abc import ABC, abstractmethod
from collections import OrderedDict
from pathlib import Path
from typing import Any

import torch
from torch import nn

from baselines.sluice_arm import fill
from checkpoints import DTYPES
from sluice import _core
from sluice.config import OffloadOptions
from sluice.session import Session
from sluice.tensors import DTYPE_NAMES

GATE = {"kind": "silu", "interleaved": False, "alpha": 1.702, "limit": 7.0}
PAGE = 4096


def kind_of_cuda() -> str:
    """ "none", "runtime" (and a device is there) or "emulated"."""
    kind = str(_core.build_info()["cuda"])
    return "none" if kind == "runtime" and _core.num_cuda_devices() == 0 else kind


def place() -> str:
    """Where torch's tensors of a call lie."""
    return "cuda:0" if kind_of_cuda() == "runtime" else "cpu"


class Block:
    """One random block of RAM that every expert's weights are a window of.

    Layer l's w13 of all experts are one run, and so are its w2: what accelerate keeps as fused
    parameters. Layers begin at other offsets, so that no two experts are equal. Time does not know
    that weights repeat: no cache holds a block of `block_bytes`.
    """

    def __init__(self, model: dict[str, Any]) -> None:
        self.layers, self.experts = model["layers"], model["experts"]
        self.hidden, self.intermediate = model["hidden"], model["intermediate"]
        self.dtype = DTYPES[model["dtype"]]
        element = self.dtype.itemsize
        self.w13_bytes = 2 * self.intermediate * self.hidden * element
        self.w2_bytes = self.intermediate * self.hidden * element
        self.expert_bytes = self.w13_bytes + self.w2_bytes
        longest = self.experts * self.w13_bytes
        self.bytes = max(model["block_bytes"], longest + self.layers * PAGE) // PAGE * PAGE
        generator = torch.Generator().manual_seed(model["seed"])
        tile = torch.randn(min(self.bytes // element, 1 << 26), generator=generator)
        tile = (tile / self.hidden**0.5).to(self.dtype).view(torch.uint8)
        self.memory = torch.empty(self.bytes + PAGE, dtype=torch.uint8)
        self.begin = -self.memory.data_ptr() % PAGE
        view = self.view()
        for at in range(0, self.bytes, tile.numel()):
            end = min(at + tile.numel(), self.bytes)
            view[at:end] = tile[: end - at]
        room13, room2 = self.bytes - longest, self.bytes - self.experts * self.w2_bytes
        step = max(PAGE, room13 // self.layers // PAGE * PAGE)
        self.base13 = [layer * step % (room13 + 1) for layer in range(self.layers)]
        self.base2 = [(layer * step + 64 * PAGE) % (room2 // PAGE * PAGE + 1) // PAGE * PAGE
                      for layer in range(self.layers)]  # fmt: skip

    def view(self) -> torch.Tensor:
        return self.memory[self.begin : self.begin + self.bytes]

    @property
    def address(self) -> int:
        return self.memory.data_ptr() + self.begin

    def sections(self, layer: int, expert: int) -> tuple[int, int]:
        """Offsets of w13 and w2 in the block."""
        return (
            self.base13[layer] + expert * self.w13_bytes,
            self.base2[layer] + expert * self.w2_bytes,
        )

    def fused(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """gate_up_proj [E, 2I, H] and down_proj [E, H, I]."""
        w13 = self.view()[self.base13[layer] :][: self.experts * self.w13_bytes]
        w2 = self.view()[self.base2[layer] :][: self.experts * self.w2_bytes]
        return (
            w13.view(self.dtype).view(self.experts, 2 * self.intermediate, self.hidden),
            w2.view(self.dtype).view(self.experts, self.hidden, self.intermediate),
        )

    def store(self) -> Any:
        builder = _core.StoreBuilder()
        for layer in range(self.layers):
            builder.add_layer(
                f"layers.{layer}.experts",
                self.experts,
                DTYPE_NAMES[self.dtype],
                self.hidden,
                self.intermediate,
                gated=True,
                has_bias=False,
            )
            for expert in range(self.experts):
                places = self.sections(layer, expert)
                sizes = (self.w13_bytes, self.w2_bytes)
                for name, at, nbytes in zip(("w13", "w2"), places, sizes, strict=True):
                    builder.add_piece(layer, expert, name, offset=self.address + at, nbytes=nbytes)
        store = builder.build()
        store.adopted = [self.memory]
        return store


class LayerArm(ABC):
    """Computes layer after layer; `setup` once, `forward` often, `close` at the end."""

    bitwise = True
    state = "pinned"
    #: Layers that a sample goes through; None: all.
    sampled_layers: int | None = None

    def __init__(self, mode: str, block: Block, scenario: dict[str, Any], share: float) -> None:
        self.mode, self.block, self.scenario, self.share = mode, block, scenario, share

    @abstractmethod
    def setup(self) -> None: ...

    @abstractmethod
    def forward(
        self, layer: int, hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor
    ) -> torch.Tensor: ...

    @abstractmethod
    def counters(self) -> dict[str, Any]:
        """Of sluice.stats.Stats, as far as the arm has them."""

    @abstractmethod
    def memory(self) -> dict[str, int]: ...

    def config(self) -> dict[str, Any]:
        return {"mode": self.mode}

    @abstractmethod
    def close(self) -> None: ...


class SluiceLayers(LayerArm):
    """A session over the block, or over a pack of it on the disk."""

    def __init__(
        self, mode: str, block: Block, scenario: dict[str, Any], share: float, pack: Path | None
    ) -> None:
        super().__init__(mode, block, scenario, share)
        self.pack = pack
        in_ram = scenario.get("budget", {}).get("host_memory", "100%") == "100%"
        self.state = "pinned" if in_ram else "direct"
        self.session: Any = None
        self.settings: dict[str, Any] = {}

    def setup(self) -> None:
        store = _core.open_pack(str(self.pack))[0] if self.pack is not None else self.block.store()
        budget = self.scenario.get("budget", {})
        settings: dict[str, Any] = {
            "device_memory": f"{self.share * 100:g}%",
            "policy": budget.get("policy", "decayed-lfu"),
            "io_threads": budget.get("io_threads", 4),
        }
        if _core.has_host_tier(place()):
            settings["host_tier"] = budget.get("host_tier", "inclusive")
            settings["host_memory"] = budget.get("host_memory", "100%")
        options = OffloadOptions(**settings)
        self.settings = options.to_dict()
        gates = [{"name": f"layers.{n}.experts", **GATE} for n in range(self.block.layers)]
        self.session = Session(store, options, gates, place())
        self.session.wait_for_host_tier()
        if self.share == 1.0 and any(self.session.residency()):  # else computed where it lies
            fill(self.session)

    def forward(
        self, layer: int, hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor
    ) -> torch.Tensor:
        return self.session.experts_forward(layer, hidden, ids, weights)

    def counters(self) -> dict[str, Any]:
        return self.session.stats().to_dict()

    def memory(self) -> dict[str, int]:
        stats = self.session.stats()
        return {
            "expert_bytes_granted": stats.budget_bytes,
            "expert_bytes_used": stats.peak_resident_bytes,
            "host_tier_bytes": stats.host_tier_bytes,
            "pinned_bytes": stats.pinned_bytes,
            "workspace_bytes": stats.workspace_bytes,
        }

    def config(self) -> dict[str, Any]:
        return {"mode": self.mode, **self.settings, "pack": "none" if self.pack is None else "made"}

    def close(self) -> None:
        if self.session is not None:
            self.session.close()
        self.session = None


class OnDevice:
    """Tensors as addresses of the device: torch's own, or copies where the device is emulated."""

    def __init__(self, gpu: Any) -> None:
        self.gpu = gpu
        self.emulated = kind_of_cuda() == "emulated"
        self._kept: list[Any] = []

    def address(self, tensor: torch.Tensor) -> int:
        if not self.emulated:
            return tensor.data_ptr()
        pinned = self.gpu.allocate_pinned(tensor.nbytes)
        memory = self.gpu.allocate(tensor.nbytes)
        ctypes.memmove(pinned.address, tensor.data_ptr(), tensor.nbytes)
        self.gpu.copy(memory.address, pinned.address, tensor.nbytes, 0)
        self._kept += [pinned, memory]
        return memory.address

    def back(self, tensor: torch.Tensor, address: int, stream: int) -> None:
        """What was written at `address` into `tensor`; nothing where they are one."""
        if not self.emulated:
            return
        pinned = self.gpu.allocate_pinned(tensor.nbytes)
        self.gpu.read(pinned.address, address, tensor.nbytes, stream)
        wait_for(self.gpu, stream)
        ctypes.memmove(tensor.data_ptr(), pinned.address, tensor.nbytes)
        self._kept.clear()


def wait_for(gpu: Any, stream: int) -> None:
    event = gpu.record(stream)
    gpu.synchronize(event)
    gpu.release(event)


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


class FusedExperts(nn.Module):
    """One layer as transformers 5 keeps it, with its eager loop over the experts that were hit."""

    def __init__(self, gate_up: torch.Tensor, down: torch.Tensor) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(gate_up, requires_grad=False)
        self.down_proj = nn.Parameter(down, requires_grad=False)

    def forward(
        self, hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor
    ) -> torch.Tensor:
        out = torch.zeros_like(hidden)
        for expert in ids.unique().tolist():
            token, position = torch.where(ids == expert)
            gate, up = nn.functional.linear(hidden[token], self.gate_up_proj[expert]).chunk(2, -1)
            rows = nn.functional.linear(nn.functional.silu(gate) * up, self.down_proj[expert])
            out.index_add_(0, token, (rows * weights[token, position, None]).to(out.dtype))
        return out


class AccelerateLayers(LayerArm):
    """accelerate's own hook on each layer's fused experts: all of them come, pageable, and go."""

    bitwise = False
    state = "pageable"

    def setup(self) -> None:
        from accelerate.hooks import AlignDevicesHook, add_hook_to_module

        wanted = self.scenario["workload"].get("accelerate_layers", self.block.layers)
        self.sampled_layers = min(wanted, self.block.layers)
        self.modules = []
        for layer in range(self.sampled_layers):
            module = FusedExperts(*self.block.fused(layer))
            kept = dict(module.named_parameters())
            hook = AlignDevicesHook(
                execution_device=torch.device(place()),
                offload=True,
                io_same_device=True,
                weights_map={name: value.data for name, value in kept.items()},
            )
            add_hook_to_module(module, hook)
            self.modules.append(module)
        self.calls = 0

    def forward(
        self, layer: int, hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor
    ) -> torch.Tensor:
        self.calls += 1
        return self.modules[layer](hidden, ids, weights)

    def counters(self) -> dict[str, Any]:
        return {"bytes_read": self.calls * self.block.experts * self.block.expert_bytes}

    def memory(self) -> dict[str, int]:
        layer = self.block.experts * self.block.expert_bytes
        return {"expert_bytes_granted": layer, "expert_bytes_used": layer}

    def config(self) -> dict[str, Any]:
        return {"mode": self.mode, "layers": self.sampled_layers, "library": "accelerate"}

    def close(self) -> None:
        self.modules = []


def make_layer_arm(
    mode: str, block: Block, scenario: dict[str, Any], share: float, pack: Path | None
) -> LayerArm:
    """`sluice`, `lru-overlap`, `lru-demand`, `accelerate-v5`."""
    if mode == "sluice":
        return SluiceLayers(mode, block, scenario, share, pack)
    if mode in {"lru-overlap", "lru-demand"}:
        return LruLayers(mode, block, scenario, share, overlap=mode == "lru-overlap")
    if mode == "accelerate-v5":
        return AccelerateLayers(mode, block, scenario, share)
    raise ValueError(f"mode: got {mode!r}; see baselines/layer_arms.py")
