"""What every arm is, and how it generates."""

import inspect
import itertools
import time
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from checkpoints import DTYPES
from routing import Replay
from sluice import _core
from sluice.folders import PACK_SUFFIX


@dataclass
class Sample:
    """One generation: when each token was there, what it read, what it said.

    `counters` and `began_s` (on the monotonic clock) concern the tokens behind the prompt, or the
    prompt where it is all there is.
    """

    prefill_s: float
    token_s: list[float]
    tokens: list[int]
    logits: torch.Tensor
    began_s: float
    counters: dict[str, Any] = field(default_factory=dict)

    @property
    def decode_s(self) -> float:
        """Seconds per token after the first."""
        return sum(self.token_s) / max(1, len(self.token_s))


@dataclass(frozen=True)
class Generation:
    """What one generation routes: experts `[tokens, layers, top_k]` of the prompt's tokens, which
    run in one forward, and of the others, each in its own."""

    experts: np.ndarray
    prompt_tokens: int

    def steps(self) -> list[list[np.ndarray]]:
        """Per forward and layer, the distinct experts."""
        tokens, layers, _ = self.experts.shape
        cuts = [0, *range(self.prompt_tokens, tokens + 1)]
        return [
            [np.unique(self.experts[begin:end, layer]) for layer in range(layers)]
            for begin, end in itertools.pairwise(cuts)
        ]


def shards_of(checkpoint: Path) -> list[Path]:
    """A checkpoint's own files: a pack may lie beside them."""
    return [p for p in checkpoint.glob("*.safetensors") if not p.name.endswith(PACK_SUFFIX)]


def expert_bytes(checkpoint: Path) -> int:
    """Bytes of every tensor below an `experts` module."""
    headers = [_core.read_safetensors_header(str(path)) for path in shards_of(checkpoint)]
    return sum(
        size
        for header in headers
        for name, _, _, _, size in header["tensors"]
        if ".experts." in name
    )


class Arm(ABC):
    """One way to run the checkpoint. `setup` once, `generate` often, `close` at the end."""

    #: "direct", "cold", "warm" or "resident": never mixed in one row.
    state = "resident"
    #: Same arithmetic as resident-sluice, hence bitwise equal; else within a tolerance.
    bitwise = False
    #: Whether `expect` wants to be told what will be routed.
    knows_future = False

    def __init__(self, mode: str, checkpoint: Path, scenario: dict[str, Any]) -> None:
        self.mode = mode
        self.checkpoint = checkpoint
        self.scenario = scenario
        self.dtype = DTYPES[scenario["model"]["dtype"]]
        self.model: Any = None
        self.replay: Replay | None = None
        self._mark: tuple[float, dict[str, Any]] = (0.0, {})

    @abstractmethod
    def load(self) -> Any:
        """The model, in eval mode."""

    def setup(self) -> None:
        self.model = self.load()
        self.replay = Replay(self.model)

    def after_forward(self) -> None:  # noqa: B027, arms need not have one
        """Called behind every forward, outside of what is timed."""

    def expect(self, generations: list["Generation"]) -> None:  # noqa: B027, most cannot know
        """Told before each generation of an arm that `knows_future`: what it and those behind it
        will route; nothing where that is not known."""

    def counters(self) -> dict[str, Any]:
        """Monotonic counters; a sample keeps their difference."""
        return {}

    def memory(self) -> dict[str, int]:
        """Expert bytes that the arm was granted and, at most, held; bytes of the files it reads
        them from. Without a bound both are every expert's."""
        held = expert_bytes(self.checkpoint)
        return {"expert_bytes_granted": held, "expert_bytes_used": held, "file_bytes": 0}

    def config(self) -> dict[str, Any]:
        """Settings for the row."""
        return {"mode": self.mode}

    def close(self) -> None:
        self.model = None
        self.replay = None

    @torch.no_grad()
    def generate(
        self,
        text: torch.Tensor,
        prompt_tokens: int,
        new_tokens: int,
        routes: np.ndarray | None,
        weights: np.ndarray | None = None,
    ) -> Sample:
        """Decodes `new_tokens` after the first `prompt_tokens` of `text` [1, N].

        Where `text` goes on behind the prompt it is fed (teacher-forced, so that arms with other
        rounding stay on one text); where it ends, greedy decoding takes over.
        """
        assert self.replay is not None
        gaps: list[float] = []
        tokens: list[int] = []
        if routes is None:
            logits = self._loop(text, prompt_tokens, new_tokens, gaps, tokens)
        else:
            self.replay.start(routes, weights)
            with self.replay.installed():
                logits = self._loop(text, prompt_tokens, new_tokens, gaps, tokens)
        began, before = self._mark
        after = self.counters()
        moved = {k: v - before[k] for k, v in after.items() if isinstance(v, int | float)}
        return Sample(gaps[0], gaps[1:], tokens, logits, began, moved)

    def _loop(
        self,
        text: torch.Tensor,
        prompt_tokens: int,
        new_tokens: int,
        gaps: list[float],
        tokens: list[int],
    ) -> torch.Tensor:
        ids, cache, logits = text[:, :prompt_tokens], None, torch.empty(0)
        self._mark = (time.monotonic(), self.counters())
        # transformers 5.24 renamed `past_key_values`.
        named = inspect.signature(self.model.forward).parameters
        cache_name = "cache" if "cache" in named else "past_key_values"
        for step in range(new_tokens):
            start = time.perf_counter()
            out = self.model(input_ids=ids, **{cache_name: cache}, use_cache=True, logits_to_keep=1)
            logits = out.logits[:, -1]
            ids = logits.argmax(-1, keepdim=True)
            gaps.append(time.perf_counter() - start)
            cache = out[cache_name]
            tokens.append(int(ids))
            position = prompt_tokens + step
            if position < text.shape[1]:
                ids = text[:, position : position + 1]
            self.after_forward()
            if step == 0 and new_tokens > 1:  # a decode sample counts what comes behind the prompt
                self._mark = (time.monotonic(), self.counters())
        return logits.float().clone()
