"""What a trace holds, in figures: tokens by phase and task, skew and overlap by layer."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import numpy as np

from sluice.text import table
from sluice.trace.trace import UNKNOWN, Array, Trace


@dataclass(frozen=True, slots=True)
class TaskCount:
    """One task's share: sequences, and tokens of prompts, written, and of unknown phase."""

    task: str
    sequences: int
    prompt: int
    decode: int
    unknown: int


@dataclass(frozen=True, slots=True)
class LayerSkew:
    """How unevenly a layer is used.

    Args:
        layer: Position among the MoE layers.
        used: Experts that any token was sent to.
        entropy: Of the popularity, over that of an even one: 1 is even.
        top_quarter: Share of routes that went to the most used quarter of the experts; 0.25 is
            even.
        overlap: Share of a token's experts that its predecessor in the sequence had, too; k / E by
            chance.
    """

    layer: int
    used: int
    entropy: float
    top_quarter: float
    overlap: float


@dataclass(frozen=True, slots=True)
class TraceSummary:
    """A trace in figures."""

    model: str
    source: str
    own_text: bool | None
    sequences: int
    contents: int
    tokens: int
    layers: int
    experts: int
    top_k: int
    kept: tuple[str, ...]
    tasks: tuple[TaskCount, ...]
    by_layer: tuple[LayerSkew, ...]

    def to_dict(self) -> dict[str, Any]:
        """As JSON holds it."""
        return dataclasses.asdict(self)

    def text(self) -> str:
        """As a terminal shows it."""
        wrote = {True: "own text", False: "teacher-forced", None: "unknown text"}[self.own_text]
        head = [
            f"{self.model or 'unknown model'}: {self.tokens:,} tokens of {self.sequences:,} "
            f"sequences ({self.contents:,} different), {wrote}",
            f"{self.layers} MoE layers, top {self.top_k} of {self.experts} experts; kept: "
            + ", ".join(self.kept),
            *([f"source: {self.source}"] if self.source else []),
        ]
        tasks = table(
            ("task", "sequences", "prompt", "decode", "unknown phase"),
            [
                (t.task or "-", *(f"{n:,}" for n in (t.sequences, t.prompt, t.decode, t.unknown)))
                for t in self.tasks
            ],
        )
        layers = table(
            ("layer", "experts used", "entropy", "top quarter", "overlap"),
            [
                (
                    str(s.layer),
                    str(s.used),
                    f"{s.entropy:.3f}",
                    f"{s.top_quarter:.1%}",
                    f"{s.overlap:.1%}",
                )
                for s in self.by_layer
            ],
        )
        return "\n".join([*head, "", tasks, "", layers])


def describe(trace: Trace) -> TraceSummary:
    """The trace in figures."""
    optional = ("weights", "token_ids", "steps", "hidden")
    return TraceSummary(
        model=trace.model,
        source=trace.source,
        own_text=trace.own_text,
        sequences=len(trace.sequences),
        contents=len({sequence.content for sequence in trace}),
        tokens=trace.num_tokens,
        layers=trace.num_layers,
        experts=trace.num_experts,
        top_k=trace.top_k,
        kept=("experts", *(name for name in optional if getattr(trace, name) is not None)),
        tasks=tuple(_count(trace, task) for task in trace.tasks),
        by_layer=tuple(_skew(trace, layer) for layer in range(trace.num_layers)),
    )


def _count(trace: Trace, task: str) -> TaskCount:
    sequences = [sequence for sequence in trace if sequence.task == task]
    known = [sequence for sequence in sequences if sequence.prompt_tokens != UNKNOWN]
    return TaskCount(
        task=task,
        sequences=len(sequences),
        prompt=sum(s.prompt_tokens for s in known),
        decode=sum(s.length - s.prompt_tokens for s in known),
        unknown=sum(s.length for s in sequences) - sum(s.length for s in known),
    )


def _skew(trace: Trace, layer: int) -> LayerSkew:
    routes: Array = trace.experts[:, layer]
    counts = np.bincount(routes[routes >= 0], minlength=trace.num_experts)
    share = counts / max(1, counts.sum())
    used = share[share > 0]
    entropy = float(-(used * np.log(used)).sum() / np.log(max(2, trace.num_experts)))
    quarter = max(1, trace.num_experts // 4)
    # Pairs of neighbours, but those of two sequences.
    follows = np.ones(max(0, trace.num_tokens - 1), dtype=bool)
    follows[[s.start - 1 for s in trace.sequences if s.start]] = False
    now, before = routes[1:][follows], routes[:-1][follows]
    shared = ((now[:, :, None] == before[:, None, :]) & (now >= 0)[:, :, None]).any(axis=2)
    chosen = int((now >= 0).sum())
    return LayerSkew(
        layer=layer,
        used=len(used),
        entropy=entropy,
        top_quarter=float(np.sort(share)[-quarter:].sum()),
        overlap=float(shared.sum() / chosen) if chosen else 0.0,
    )
