"""What a task's next prompt will use, by its last ones' histograms: eMoE's sequence model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.nn import functional

from sluice.errors import ConfigError
from sluice.predict.base import Progress
from sluice.predict.networks.training import (
    Descent,
    check_ranges,
    load_module,
    module_state,
    seeded,
)
from sluice.predict.prompts import LEAST_PROMPTS, PromptPredictor, PromptSettings, histogram_of
from sluice.trace import Trace

Array = NDArray[Any]

_BATCH = 32
_LEAST_SHARE = 1e-3


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptEncoderSettings(PromptSettings):
    """As `PromptSettings`, and how large and how long.

    Args:
        width: Of the encoder.
        layers: Of the encoder.
        heads: Divides the width.
        dropout: In training.
        batches: Steps of training, 32 prompts each.
        learning_rate: Of AdamW, annealed to nothing.
        weight_decay: Of AdamW.
    """

    width: int = 128
    layers: int = 4
    heads: int = 4
    dropout: float = 0.1
    batches: int = 120
    learning_rate: float = 3e-4
    weight_decay: float = 0.01

    def __post_init__(self) -> None:
        PromptSettings.__post_init__(self)  # super() does not see through slots
        check_ranges(
            self, at_least_one=("width", "layers", "heads", "batches"), shares=("dropout",)
        )
        if self.width % self.heads:
            raise ConfigError(f"width: got {self.width}, expected a multiple of {self.heads} heads")


class HistogramEncoder(nn.Module):
    """One position per (prompt, layer): the last prompts', then the next one's.

    The next prompt's position of layer l reads nothing of it (mode A), or the shares of the layer
    below (mode L, where it sees no layer above); what is said there is on top of the mean of the
    prompts before.
    """

    def __init__(self, settings: PromptEncoderSettings, num: tuple[int, int, int]) -> None:
        super().__init__()
        layers, experts, tasks = num
        width = settings.width
        self.shares = nn.Linear(experts, width)
        self.layer = nn.Parameter(torch.randn(layers, width) * 0.02)
        self.age = nn.Parameter(torch.randn(LEAST_PROMPTS + 1, width) * 0.02)
        self.task = nn.Embedding(tasks, width)
        block = nn.TransformerEncoderLayer(
            width,
            settings.heads,
            4 * width,
            settings.dropout,
            activation="gelu",
            batch_first=True,
            norm_first=True,
        )
        self.encoder = nn.TransformerEncoder(
            block, settings.layers, nn.LayerNorm(width), enable_nested_tensor=False
        )
        self.head = nn.Linear(width, experts)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(
        self, history: torch.Tensor, there: torch.Tensor, below: torch.Tensor | None, task: Any
    ) -> torch.Tensor:
        """Logarithms of shares.

        Args:
            history: `[B, P, S, E]`, the newest last.
            there: bool `[B, P]`: whether the prompt is there.
            below: `[B, S, E]`, at layer l the next prompt's shares of layer l - 1; None: mode A.
            task: int64 `[B]`.

        Returns:
            `[B, S, E]`, as logits of a softmax over experts.
        """
        _, prompts, layers, experts = history.shape
        inputs = torch.cat([history, torch.zeros_like(history[:, :1])], 1)
        if below is not None:
            inputs[:, -1] = below
        x = self.shares(inputs * experts) + self.layer + self.age[-prompts - 1 :, None]
        x = (x + self.task(task)[:, None, None]).flatten(1, 2)
        absent = torch.cat([~there, torch.zeros_like(there[:, :1])], 1)
        absent = absent.repeat_interleave(layers, 1)
        blocked = torch.zeros(x.shape[1], x.shape[1], dtype=torch.bool)
        blocked[:-layers, -layers:] = True
        if below is not None:
            blocked[-layers:, -layers:] = torch.ones(layers, layers, dtype=torch.bool).triu(1)
        x = self.encoder(x, mask=blocked, src_key_padding_mask=absent)[:, -layers:]
        known = there[:, :, None, None]
        mean = (history * known).sum(1) / known.sum(1).clamp(min=1)
        return self.head(x) + torch.log(mean + _LEAST_SHARE)


class PromptEncoder(PromptPredictor[PromptEncoderSettings]):
    """`prompt-encoder`: a small transformer over the last four prompts' histograms of a task.

    Mode A makes one model call for all layers, mode L one a layer.

    Source: 2503.06823 §3.2.2 for both modes; size and training are this project's, where the paper
    (an XLNet over expert ids) gives none.
    """

    name = "prompt-encoder"
    settings_type = PromptEncoderSettings

    _net: HistogramEncoder | None = None

    def state(self) -> dict[str, Array]:
        """The encoder by its parameters' names, profiles and the tasks' names."""
        assert self._net is not None
        return module_state(self._net) | self._profile_state()

    def load_state(self, arrays: Mapping[str, Array]) -> None:
        """Takes what `state` gave."""
        self._load_profiles(arrays)
        self._net = self._new_net()
        load_module(self._net.eval(), arrays)

    def _new_net(self) -> HistogramEncoder:
        assert self.shape is not None
        num = (self.shape.num_layers, self.shape.num_experts, len(self._profiles))
        return HistogramEncoder(self.settings, num)

    def _fit(
        self, trace: Trace, choose: Trace | None, seed: int, progress: Progress
    ) -> Mapping[str, Any] | None:
        settings = self.settings
        self._fit_profiles(trace)
        samples = self._samples(trace)
        held = self._samples(choose) if choose is not None else []
        rng = np.random.default_rng(seed)
        notes: dict[str, Any] = {"loss": [], "choose_loss": []}
        with seeded(seed):
            self._net = net = self._new_net()
            descent = Descent(net, settings, settings.batches)
            looks = max(settings.batches // 8, 1)
            for step in range(settings.batches if samples else 0):
                net.train()
                some = [samples[i] for i in rng.integers(len(samples), size=_BATCH)]
                descent.step(self._loss(some))
                progress(step + 1, settings.batches)
                if (step + 1) % looks and step + 1 < settings.batches:
                    continue
                notes["loss"].append(descent.mean_loss())
                if held:
                    net.eval()
                    with torch.no_grad():
                        missed = float(self._loss(held))
                    notes["choose_loss"].append(missed)
                    descent.keep_if_best(missed)
            descent.restore_best()
        return notes

    def _samples(self, trace: Trace) -> list[tuple[list[Array], Array, int]]:
        """Per prompt, once for its task and once for all: those before it, itself, which task."""
        tasks = [*self._profiles]
        histories: dict[str, list[Array]] = {}
        found: list[tuple[list[Array], Array, int]] = []
        for sequence in trace.sequences:
            histogram = histogram_of(trace, sequence)
            for task in dict.fromkeys(["", sequence.task]):
                before = histories.setdefault(task, [])
                if before and task in self._profiles:
                    found.append((before[-LEAST_PROMPTS:], histogram, tasks.index(task)))
                before.append(histogram)
        return found

    def _loss(self, samples: Sequence[tuple[list[Array], Array, int]]) -> torch.Tensor:
        """Cross-entropy with the next prompt's shares, mean over layers."""
        wanted = torch.from_numpy(np.stack([each[1] for each in samples]))
        below = None
        if self.settings.mode == "L":
            below = torch.cat([torch.zeros_like(wanted[:, :1]), wanted[:, :-1]], 1)
        logits = self._run([each[0] for each in samples], below, [each[2] for each in samples])
        return -(wanted * functional.log_softmax(logits, -1)).sum(-1).mean()

    def _run(
        self, histories: list[list[Array]], below: torch.Tensor | None, tasks: list[int]
    ) -> torch.Tensor:
        assert self._net is not None
        shape = histories[0][0].shape
        history = torch.zeros(len(histories), LEAST_PROMPTS, *shape)
        there = torch.zeros(len(histories), LEAST_PROMPTS, dtype=torch.bool)
        for i, each in enumerate(histories):
            history[i, -len(each) :] = torch.from_numpy(np.stack(each))
            there[i, -len(each) :] = True
        return self._net(history, there, below, torch.tensor(tasks))

    def _whole(self, task: str) -> Array:
        return self._call(task, None)

    def _one_layer(self, task: str, layer: int, below: Array) -> Array:
        shifted = np.zeros_like(below)
        shifted[1:] = below[:-1]
        return self._call(task, torch.from_numpy(shifted)[None])[layer]

    def _call(self, task: str, below: torch.Tensor | None) -> Array:
        history = [*self.histories.get(task, ())]
        if not history:
            return self._profile(task)
        known = [*self._profiles]
        index = known.index(task if task in self._profiles else "")
        with torch.no_grad():
            return self._run([history], below, [index])[0].softmax(-1).numpy()
