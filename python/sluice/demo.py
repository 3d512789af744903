"""The demonstration: the reference model, ten tasks, stock and offloaded, token by token equal."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from sluice.config import OffloadOptions
from sluice.hf.auto import load_causal_lm, load_tokenizer
from sluice.plot import Recorder, Recording
from sluice.reference import ReferencePrompt, reference_model, reference_prompts
from sluice.session import Session


@dataclass(frozen=True, slots=True)
class TaskResult:
    """One prompt, generated twice.

    Args:
        task: Of ten, such as "intent".
        tokens_equal: Whether both models chose the same tokens, all of them.
        new_tokens: How many the offloaded model chose.
        text: What they say.
        stock_text: What the stock model's say.
        tokens_per_s: New tokens by seconds of `generate`, prompt included.
        stock_tokens_per_s: The same of the stock model, whose experts are all in memory.
        hit_rate: Hits by requests.
        bytes_read: From disk, for this prompt.
        stall_s: Seconds in which the model waited for bytes.
    """

    task: str
    tokens_equal: bool
    new_tokens: int
    text: str
    stock_text: str
    tokens_per_s: float
    stock_tokens_per_s: float
    hit_rate: float
    bytes_read: int
    stall_s: float


@dataclass(frozen=True, slots=True)
class DemoResult:
    """All prompts, and what the whole run took.

    Args:
        device_memory: The budget as it was asked for.
        policy: The eviction policy.
        compute_dtype: What both models compute in.
        max_new_tokens: The most tokens of one answer.
        num_slots: Experts that fit at once.
        num_experts: Experts of all layers.
        expert_bytes: Slot bytes of all experts: what "100%" means.
        budget_bytes: What the session was given.
        peak_resident_bytes: The most slot bytes that held an expert at any time.
        workspace_bytes: Bounce buffers and scratch, which the budget does not pay for.
        hit_rate: Hits by requests, all prompts together.
        bytes_read: From disk, all prompts together.
        stall_s: Seconds in which the model waited for bytes.
        tokens_per_s: New tokens by seconds of `generate`.
        stock_tokens_per_s: The same of the stock model.
        degradations: What worked less well than it could, by name.
        tasks: One result per prompt.
    """

    device_memory: str
    policy: str
    compute_dtype: str
    max_new_tokens: int
    num_slots: int
    num_experts: int
    expert_bytes: int
    budget_bytes: int
    peak_resident_bytes: int
    workspace_bytes: int
    hit_rate: float
    bytes_read: int
    stall_s: float
    tokens_per_s: float
    stock_tokens_per_s: float
    degradations: dict[str, int]
    tasks: tuple[TaskResult, ...]

    @property
    def tokens_equal(self) -> bool:
        """Whether every task's tokens are those of the stock model."""
        return all(task.tokens_equal for task in self.tasks)

    def to_dict(self) -> dict[str, Any]:
        """As JSON spells it."""
        return {"tokens_equal": self.tokens_equal} | asdict(self)


@dataclass(frozen=True, slots=True)
class _Answer:
    tokens: tuple[int, ...]
    seconds: float


def run_demo(
    *,
    device_memory: str = "25%",
    policy: str = "decayed-lfu",
    max_new_tokens: int = 32,
    out: Path | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> DemoResult:
    """Generates each prompt with the stock model and with its experts offloaded, greedily.

    Both compute in float32 over the same bf16 weights: the stock model widens them when it loads,
    sluice keeps its experts as they are stored. So equal tokens mean equal arithmetic up to the
    last bits, and not a lucky rounding.

    Args:
        device_memory: Bytes for experts, or a size, or a share.
        policy: Which expert leaves when a slot is needed.
        max_new_tokens: The most tokens of one answer.
        out: A folder for `demo.png` and `timeline.json`; made if it is not there.
        progress: Called with prompts done and all.

    Raises:
        SluiceError: The budget cannot work, the model's files are damaged, transformers is missing.
    """
    options = OffloadOptions(device_memory=device_memory, policy=policy)
    folder = reference_model()
    prompts = reference_prompts()
    tokenizer = load_tokenizer(folder)
    offloaded = load_causal_lm(folder, dtype=torch.float32, offload=options)
    session: Session = offloaded.sluice
    stock = load_causal_lm(folder, dtype=torch.float32)
    recorder = Recorder(session)

    for model in (stock, offloaded):  # first calls pay for caches and thread pools, not for experts
        _generate(model, tokenizer, prompts[0], 1)
    begin = session.stats()
    results: list[TaskResult] = []
    seconds, stock_seconds = 0.0, 0.0
    for prompt in prompts:
        expected = _generate(stock, tokenizer, prompt, max_new_tokens)
        before = session.stats()
        recorder.label = prompt.task
        answer = _generate(offloaded, tokenizer, prompt, max_new_tokens, recorder)
        spent = session.stats() - before
        seconds += answer.seconds
        stock_seconds += expected.seconds
        results.append(
            TaskResult(
                task=prompt.task,
                tokens_equal=answer.tokens == expected.tokens,
                new_tokens=len(answer.tokens),
                text=tokenizer.decode(answer.tokens, skip_special_tokens=True),
                stock_text=tokenizer.decode(expected.tokens, skip_special_tokens=True),
                tokens_per_s=len(answer.tokens) / answer.seconds,
                stock_tokens_per_s=len(expected.tokens) / expected.seconds,
                hit_rate=_share(spent.hits, spent.requests),
                bytes_read=spent.bytes_read,
                stall_s=spent.stall_s,
            )
        )
        if progress is not None:
            progress(len(results), len(prompts))
    after = session.stats()
    spent = after - begin
    recording = recorder.recording()
    if out is not None:
        _write_pictures(out, session, recording)
    result = DemoResult(
        device_memory=device_memory,
        policy=policy,
        compute_dtype="float32",
        max_new_tokens=max_new_tokens,
        num_slots=sum(len(slots) for slots in session.residency()),
        num_experts=sum(recording.experts),
        expert_bytes=session.store.total_slot_bytes,
        budget_bytes=after.budget_bytes,
        peak_resident_bytes=after.peak_resident_bytes,
        workspace_bytes=after.workspace_bytes,
        hit_rate=_share(spent.hits, spent.requests),
        bytes_read=spent.bytes_read,
        stall_s=spent.stall_s,
        tokens_per_s=sum(task.new_tokens for task in results) / seconds,
        stock_tokens_per_s=sum(task.new_tokens for task in results) / stock_seconds,
        degradations=dict(after.degradations),
        tasks=tuple(results),
    )
    session.close()
    return result


def _generate(
    model: Any,
    tokenizer: Any,
    prompt: ReferencePrompt,
    max_new_tokens: int,
    streamer: Recorder | None = None,
) -> _Answer:
    """Greedy tokens after the prompt, without it."""
    inputs = tokenizer(prompt.text, return_tensors="pt", add_special_tokens=False)
    begin_s = time.perf_counter()
    tokens = model.generate(
        **inputs, max_new_tokens=max_new_tokens, do_sample=False, streamer=streamer
    )
    seconds = time.perf_counter() - begin_s
    return _Answer(tuple(tokens[0, inputs["input_ids"].shape[1] :].tolist()), seconds)


def _write_pictures(out: Path, session: Session, recording: Recording) -> None:
    from sluice.plot import generation_figure

    out.mkdir(parents=True, exist_ok=True)
    generation_figure(recording).savefig(out / "demo.png", dpi=130)
    session.timeline(str(out / "timeline.json"))


def _share(part: int, whole: int) -> float:
    return part / whole if whole else 0.0
