"""The weights of a stack of layers: one block of RAM that all arms share."""

from __future__ import annotations

from typing import Any

import torch

from checkpoints import DTYPES
from sluice import _core
from sluice.tensors import DTYPE_NAMES

PAGE = 4096


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
