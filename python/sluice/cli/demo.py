"""`sluice demo`: the shipped model in a quarter of its expert bytes, with proof and pictures."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from sluice.cli.common import Outcome, add_budget
from sluice.errors import ConfigError
from sluice.progress import Progress
from sluice.text import format_bytes, table


def add_parser(verbs: Any) -> argparse.ArgumentParser:
    """Registers the verb."""
    parser: argparse.ArgumentParser = verbs.add_parser(
        "demo",
        help="the shipped model at 25 %% of its expert bytes: same tokens, with numbers",
        description="Generates the first test prompt of ten tasks with the shipped model, stock "
        "and offloaded, both in float32 over the same bf16 weights, and compares every token. "
        "Exit code 1 when a token differs.",
    )
    add_budget(parser, default="25%", help_tail="default 25%%")
    parser.add_argument("--policy", default="decayed-lfu", help="eviction policy")
    parser.add_argument("--max-new-tokens", type=int, default=32, metavar="N")
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help="write demo.png and timeline.json here"
    )
    parser.set_defaults(run=run)
    return parser


def run(args: argparse.Namespace) -> Outcome:
    """Runs the demonstration."""
    if args.max_new_tokens < 1:
        raise ConfigError(f"--max-new-tokens: got {args.max_new_tokens}, expected 1 or more")
    from sluice.demo import run_demo

    with Progress("sluice demo", unit="tasks") as progress:
        result = run_demo(
            device_memory=args.device_memory,
            policy=args.policy,
            max_new_tokens=args.max_new_tokens,
            out=args.out,
            progress=progress,
        )
    payload = result.to_dict()
    if args.out is not None:
        payload["files"] = [str(args.out / "demo.png"), str(args.out / "timeline.json")]
    return Outcome(payload, text_of(result, args.out), code=0 if result.tokens_equal else 1)


def text_of(result: Any, out: Path | None) -> str:
    """The result for people."""
    rows = [
        (
            task.task,
            str(task.new_tokens),
            "yes" if task.tokens_equal else "NO",
            f"{task.tokens_per_s:.1f}",
            f"{task.stock_tokens_per_s:.1f}",
            f"{task.hit_rate:.1%}",
            format_bytes(task.bytes_read),
            f"{task.stall_s * 1e3:.0f} ms",
        )
        for task in result.tasks
    ]
    equal = sum(task.tokens_equal for task in result.tasks)
    lines = [
        f"The reference model: {result.num_experts} experts of "
        f"{format_bytes(result.expert_bytes)} in all; {result.device_memory} of them in memory: "
        f"{result.num_slots} slots, policy {result.policy}.",
        f"Stock and offloaded both compute in {result.compute_dtype} over the same bf16 weights; "
        "greedy; the prompts are the first test record of each task.",
        "",
        table(
            ("task", "tokens", "equal", "tok/s", "stock tok/s", "hits", "read", "stall"),
            rows,
        ),
        "",
        *(f"{task.task}: {task.text!r}" for task in result.tasks),
        *(
            f"{task.task}, stock: {task.stock_text!r}"
            for task in result.tasks
            if not task.tokens_equal
        ),
        "",
        f"{result.tokens_per_s:.1f} tok/s (stock, all in memory: "
        f"{result.stock_tokens_per_s:.1f}), hits {result.hit_rate:.1%}, "
        f"{format_bytes(result.bytes_read)} read, {result.stall_s:.2f} s stalled",
        f"peak expert memory {format_bytes(result.peak_resident_bytes)} of a budget of "
        f"{format_bytes(result.budget_bytes)}; workspace {format_bytes(result.workspace_bytes)}",
    ]
    if result.degradations:
        counted = ", ".join(f"{name} {count}" for name, count in result.degradations.items())
        lines.append(f"degradations: {counted}")
    if out is not None:
        lines.append(
            f"{out / 'demo.png'}: the run in four pictures; {out / 'timeline.json'}: open it in "
            "chrome://tracing or ui.perfetto.dev"
        )
    lines.append(f"tokens equal: {equal} of {len(result.tasks)} tasks")
    return "\n".join(lines)
