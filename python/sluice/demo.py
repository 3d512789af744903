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
from sluice.plot import Recorder, generation_figure, require_matplotlib
from sluice.reference import ReferencePrompt, reference_model, reference_prompts
from sluice.session import Session
from sluice.stats import Stats

_DTYPE = torch.float32


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
class Answer:
    """What one model generated after a prompt, and the seconds it took."""

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
    sluice keeps its experts as they are stored.

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
    if out is not None:  # what cannot be written is known before the work
        require_matplotlib()
        out.mkdir(parents=True, exist_ok=True)
    folder, prompts = reference_model(), reference_prompts()
    tokenizer = load_tokenizer(folder)
    offloaded = load_causal_lm(folder, dtype=_DTYPE, offload=options)
    stock = load_causal_lm(folder, dtype=_DTYPE)
    for model in (stock, offloaded):  # a first call pays for thread pools and lazy imports
        generate_greedily(model, tokenizer, prompts[0], 1)
    with offloaded.sluice as session:
        recorder = Recorder(session)
        begin = session.stats()
        pairs: list[tuple[Answer, Answer]] = []
        tasks: list[TaskResult] = []
        for prompt in prompts:
            recorder.label = prompt.task
            before = session.stats()
            expected = generate_greedily(stock, tokenizer, prompt, max_new_tokens)
            answer = generate_greedily(offloaded, tokenizer, prompt, max_new_tokens, recorder)
            pairs.append((answer, expected))
            spent = session.stats() - before
            tasks.append(_compare(prompt.task, tokenizer, answer, expected, spent))
            if progress is not None:
                progress(len(tasks), len(prompts))
        if out is not None:
            generation_figure(recorder.recording()).savefig(out / "demo.png", dpi=130)
            session.timeline(out / "timeline.json")
        return _summary(session, session.stats() - begin, max_new_tokens, tasks, pairs)


def generate_greedily(
    model: Any,
    tokenizer: Any,
    prompt: ReferencePrompt,
    max_new_tokens: int,
    streamer: Recorder | None = None,
) -> Answer:
    """The tokens after the prompt, without it."""
    inputs = tokenizer(prompt.text, return_tensors="pt", add_special_tokens=False)
    begin_s = time.perf_counter()
    tokens = model.generate(
        **inputs, max_new_tokens=max_new_tokens, do_sample=False, streamer=streamer
    )
    seconds = time.perf_counter() - begin_s
    return Answer(tuple(tokens[0, inputs["input_ids"].shape[1] :].tolist()), seconds)


def _compare(
    task: str, tokenizer: Any, answer: Answer, expected: Answer, spent: Stats
) -> TaskResult:
    return TaskResult(
        task=task,
        tokens_equal=answer.tokens == expected.tokens,
        new_tokens=len(answer.tokens),
        text=tokenizer.decode(answer.tokens, skip_special_tokens=True),
        stock_text=tokenizer.decode(expected.tokens, skip_special_tokens=True),
        tokens_per_s=len(answer.tokens) / answer.seconds,
        stock_tokens_per_s=len(expected.tokens) / expected.seconds,
        hit_rate=spent.hit_rate,
        bytes_read=spent.bytes_read,
        stall_s=spent.stall_s,
    )


def _summary(
    session: Session,
    spent: Stats,
    max_new_tokens: int,
    tasks: list[TaskResult],
    pairs: list[tuple[Answer, Answer]],
) -> DemoResult:
    classes = session.plan()["classes"]
    answers, expected = zip(*pairs, strict=True)
    return DemoResult(
        device_memory=str(session.options.device_memory),
        policy=session.options.policy,
        compute_dtype=str(_DTYPE).removeprefix("torch."),
        max_new_tokens=max_new_tokens,
        num_slots=sum(entry["num_slots"] for entry in classes),
        num_experts=sum(entry["num_experts"] for entry in classes),
        expert_bytes=session.store.total_slot_bytes,
        budget_bytes=spent.budget_bytes,
        peak_resident_bytes=spent.peak_resident_bytes,
        workspace_bytes=spent.workspace_bytes,
        hit_rate=spent.hit_rate,
        bytes_read=spent.bytes_read,
        stall_s=spent.stall_s,
        tokens_per_s=_rate(answers),
        stock_tokens_per_s=_rate(expected),
        degradations=spent.degradations,
        tasks=tuple(tasks),
    )


def _rate(answers: tuple[Answer, ...]) -> float:
    return sum(len(a.tokens) for a in answers) / sum(a.seconds for a in answers)
