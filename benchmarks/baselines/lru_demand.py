"""Plain LRU on demand: per-layer cache of E · share experts, load on miss, no overlap.

The floor that a cache with overlap must beat. Reads the same file ranges with O_DIRECT through the
same store, one expert at a time, and multiplies with the same few-token kernel; a call with more
tokens per expert goes to torch. Nothing is copied back.
"""

from collections import OrderedDict
from pathlib import Path
from typing import Any

import torch
from torch import nn

from baselines.sluice_arm import SluiceArm
from sluice import _core

FEW_TOKENS = 8  # kFewTokens of kernels/expert_decode.h


class LruExperts(nn.Module):
    """One layer's experts: `capacity` of them in RAM, the least recently used leaves."""

    def __init__(self, store: Any, layer: int, capacity: int, gate: dict[str, Any]) -> None:
        super().__init__()
        self.store = store
        self.layer = layer
        self.info = store.layer(layer)
        self.gate = gate
        self.parallel = _core.Parallel()
        self.capacity = capacity
        self.resident: OrderedDict[int, torch.Tensor] = OrderedDict()
        self.misses = 0
        self.requests = 0

    def fetch(self, expert: int) -> torch.Tensor:
        self.requests += 1
        if expert in self.resident:
            self.resident.move_to_end(expert)
            return self.resident[expert]
        self.misses += 1
        if len(self.resident) >= self.capacity:
            _, buffer = self.resident.popitem(last=False)
        else:
            buffer = torch.empty(self.info["slot_bytes"] + 64, dtype=torch.uint8)
        shift = -buffer.data_ptr() % 64
        aligned = buffer[shift : shift + self.info["slot_bytes"]]
        self.store.read_expert_into(
            self.layer, expert, aligned.data_ptr(), self.info["expert_bytes"]
        )
        self.resident[expert] = buffer
        return buffer

    def forward(
        self, hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor
    ) -> torch.Tensor:
        tokens, top_k = ids.shape
        rows = torch.zeros(tokens, top_k, hidden.shape[1], dtype=torch.float32)
        for expert in ids.unique().tolist():
            token, position = torch.where(ids == expert)
            rows[token, position] = self.multiply(self.fetch(expert), hidden[token])
        out = torch.zeros_like(rows[:, 0])
        for k in range(top_k):
            out = torch.addcmul(out, rows[:, k], weights[:, k, None].float())
        return out.to(hidden.dtype)

    def multiply(self, buffer: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """One expert's rows, fp32. Plain layouts without biases only."""
        inter, width = self.info["intermediate"], self.info["hidden"]
        start = buffer.data_ptr() + (-buffer.data_ptr() % 64)
        w13_bytes = 2 * inter * width * x.element_size()
        w2_offset = (w13_bytes + 63) // 64 * 64
        if x.shape[0] <= FEW_TOKENS:
            inputs = x.float().contiguous()
            out = torch.empty(x.shape[0], width)
            names = {torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32"}
            _core.expert_decode(
                self.parallel,
                "",
                self.info["dtype"],
                names[x.dtype],
                width,
                inter,
                self.gate,
                [(start, start + w2_offset, 0, 0)],
                inputs.data_ptr(),
                out.data_ptr(),
                x.shape[0],
            )
            return out
        shift = start - buffer.data_ptr()
        w13 = buffer[shift : shift + w13_bytes].view(x.dtype).view(2 * inter, width)
        w2 = buffer[shift + w2_offset :][: inter * width * x.element_size()]
        gate, up = (x @ w13.T).float().chunk(2, dim=-1)
        middle = (torch.nn.functional.silu(gate) * up).to(x.dtype)
        return (middle @ w2.view(x.dtype).view(width, inter).T).float()


class LruDemandArm(SluiceArm):
    """The checkpoint with `LruExperts` in place of its experts modules."""

    bitwise = False
    tells_demands = False

    def __init__(self, mode: str, checkpoint: Path, scenario: dict[str, Any], share: float) -> None:
        super().__init__(mode, checkpoint, scenario, share, "pack")
        self.sites: list[LruExperts] = []

    def load(self) -> Any:
        # The session only opens the store here: it gets as little as works, and is never asked.
        share, self.share = self.share, 0.05
        model = super().load()
        self.share = share
        session = model.sluice
        names = [n for n, _ in model.named_modules() if n.endswith(".experts")]
        gate = {"kind": "silu", "interleaved": False, "alpha": 0.0, "limit": 0.0}
        for layer, name in enumerate(names):
            capacity = max(1, int(session.store.layer(layer)["num_experts"] * self.share))
            site = LruExperts(session.store, layer, capacity, gate)
            model.set_submodule(name, site)
            self.sites.append(site)
        return model

    def memory(self) -> dict[str, int]:
        slots = [(s.capacity, len(s.resident), s.info["slot_bytes"]) for s in self.sites]
        return {
            **super().memory(),
            "expert_bytes_granted": sum(capacity * size for capacity, _, size in slots),
            "expert_bytes_used": sum(held * size for _, held, size in slots),
        }

    def counters(self) -> dict[str, Any]:
        read = sum(s.misses * s.info["expert_bytes"] for s in self.sites)
        return {
            "requests": sum(s.requests for s in self.sites),
            "misses": sum(s.misses for s in self.sites),
            "bytes_read": read,
            "bytes_read_demand": read,
        }
