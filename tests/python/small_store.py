"""A few experts with known weights, as a store in memory or as a pack, and what they compute."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from sluice import _core
from sluice.config import OffloadOptions
from sluice.session import Session
from sluice.tensors import DTYPE_NAMES


class SmallStore:
    """Two layers of SwiGLU experts. Keeps the weights, which adopted stores only point at."""

    def __init__(
        self,
        *,
        num_layers: int = 2,
        num_experts: int = 8,
        hidden: int = 64,
        intermediate: int = 96,
        dtype: torch.dtype = torch.float32,
        seed: int = 0,
    ) -> None:
        random = torch.Generator().manual_seed(seed)
        self.num_layers, self.num_experts = num_layers, num_experts
        self.hidden, self.intermediate, self.dtype = hidden, intermediate, dtype
        shape13, shape2 = (
            (num_experts, 2 * intermediate, hidden),
            (num_experts, hidden, intermediate),
        )
        self.w13 = [
            (torch.randn(shape13, generator=random) / hidden**0.5).to(dtype)
            for _ in range(num_layers)
        ]
        self.w2 = [
            (torch.randn(shape2, generator=random) / intermediate**0.5).to(dtype)
            for _ in range(num_layers)
        ]

    def memory_store(self) -> _core.Store:
        builder = _core.StoreBuilder()
        for layer in range(self.num_layers):
            builder.add_layer(
                f"layers.{layer}.experts",
                self.num_experts,
                DTYPE_NAMES[self.dtype],
                self.hidden,
                self.intermediate,
                gated=True,
                has_bias=False,
            )
            for section, weights in (("w13", self.w13[layer]), ("w2", self.w2[layer])):
                for expert in range(self.num_experts):
                    builder.add_piece(
                        layer,
                        expert,
                        section,
                        offset=weights[expert].data_ptr(),
                        nbytes=weights[expert].nbytes,
                    )
        return builder.build()

    def pack(self, path: Path, **options: Any) -> _core.Store:
        store = self.memory_store()
        layers = [store.layer(layer) for layer in range(self.num_layers)]
        if not path.exists():
            writer = _core.PackWriter(str(path), layers, model_id="small")
            for layer in range(self.num_layers):
                for expert in range(self.num_experts):
                    writer.append_from(store, layer, expert)
            writer.finish()
        return _core.open_pack(str(path), **options)[0]

    def layers(self, **fields: Any) -> list[dict[str, Any]]:
        layer = {"kind": "silu", "interleaved": False, "alpha": 1.702, "limit": 7.0, **fields}
        return [{"name": f"layers.{index}.experts", **layer} for index in range(self.num_layers)]

    def session(
        self, store: _core.Store, device_memory: int | str = "25%", **options: Any
    ) -> Session:
        gates = options.pop("layers", None) or self.layers()
        return Session(store, OffloadOptions(device_memory=device_memory, **options), gates)

    def call(self, num_tokens: int, top_k: int = 2, seed: int = 1) -> tuple[torch.Tensor, ...]:
        """hidden [T, H], ids [T, K], weights [T, K]."""
        random = torch.Generator().manual_seed(seed)
        hidden = torch.randn(num_tokens, self.hidden, generator=random).to(self.dtype)
        scores = torch.rand(num_tokens, self.num_experts, generator=random)
        weights, ids = scores.topk(top_k, dim=-1)
        return hidden, ids, weights.to(self.dtype)

    def reference(
        self, layer: int, hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor
    ) -> torch.Tensor:
        """In double precision."""
        out = torch.zeros(hidden.shape, dtype=torch.float64)
        for token in range(hidden.shape[0]):
            for k in range(ids.shape[1]):
                expert = int(ids[token, k])
                if not 0 <= expert < self.num_experts:
                    continue
                both = self.w13[layer][expert].double() @ hidden[token].double()
                gate, up = both.chunk(2)
                value = self.w2[layer][expert].double() @ (F.silu(gate) * up)
                out[token] += weights[token, k].double() * value
        return out

    def tolerance(self) -> float:
        return torch.finfo(self.dtype).eps * (self.hidden + self.intermediate) ** 0.5 * 4
