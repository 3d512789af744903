"""`sluice generate`: text from a local checkpoint whose experts are offloaded."""

from __future__ import annotations

import argparse
import time
from typing import Any

from sluice.cli.common import Outcome, add_budget, model_folder
from sluice.errors import ConfigError
from sluice.progress import Progress, format_bytes

_DTYPES = ("auto", "float32", "bfloat16", "float16")


def add_parser(verbs: Any) -> argparse.ArgumentParser:
    """Registers the verb."""
    parser: argparse.ArgumentParser = verbs.add_parser(
        "generate",
        help="generate text from a checkpoint with its experts offloaded",
        description="Loads a local checkpoint, experts straight from its files into slots, and "
        "continues the prompt.",
    )
    parser.add_argument("model", metavar="MODEL_DIR", help="a local checkpoint folder")
    parser.add_argument("--prompt", required=True, help="text to continue")
    parser.add_argument(
        "--chat", action="store_true", help="put the prompt through the chat template"
    )
    parser.add_argument("--max-new-tokens", type=int, default=64, metavar="N")
    parser.add_argument(
        "--temperature", type=float, default=0.0, help="0 (default): greedy, else sampling"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the sampling")
    parser.add_argument("--dtype", choices=_DTYPES, default="auto", help="what activations are in")
    parser.add_argument("--policy", default="decayed-lfu", help="eviction policy")
    parser.add_argument("--timeline", metavar="FILE", help="write a Chrome trace here")
    add_budget(parser, default=None, help_tail="no default: `sluice plan` shows what fits")
    parser.set_defaults(run=run)
    return parser


class _Counter:
    """A streamer that shows how many tokens there are."""

    def __init__(self, progress: Progress, total: int) -> None:
        self._progress = progress
        self._total = total
        self._puts = 0

    def put(self, value: object) -> None:
        """`generate` calls it with the prompt first, then with each token."""
        self._progress(self._puts, self._total)
        self._puts += 1

    def end(self) -> None:
        """Nothing to do: the bar is wiped by its `with` block."""


def run(args: argparse.Namespace) -> Outcome:
    """Generates."""
    folder = model_folder(args.model)
    if args.max_new_tokens < 1:
        raise ConfigError(f"--max-new-tokens: got {args.max_new_tokens}, expected 1 or more")
    if args.temperature < 0:
        raise ConfigError(f"--temperature: got {args.temperature}, expected 0 or more")
    if args.device_memory is None:
        raise ConfigError(
            "--device-memory: got none, expected a size such as 6GiB or 25%; "
            f"`sluice plan {args.model}` shows what each buys"
        )
    from sluice.config import OffloadOptions
    from sluice.hf.auto import load_causal_lm, load_tokenizer

    options = OffloadOptions(device_memory=args.device_memory, policy=args.policy)
    model = load_causal_lm(folder, dtype=args.dtype, offload=options)
    with model.sluice as session:
        with Progress("sluice generate", unit="tokens") as progress:
            begin_s = time.perf_counter()
            text, new_tokens = _continue(model, load_tokenizer(folder), args, progress)
            seconds = time.perf_counter() - begin_s
        if args.timeline:
            session.timeline(args.timeline)
        stats = session.stats()
    payload = {
        "text": text,
        "new_tokens": new_tokens,
        "seconds": seconds,
        "tokens_per_s": new_tokens / seconds,
        "stats": stats.to_dict(),
    }
    hit_rate = stats.hits / stats.requests if stats.requests else 0.0
    summary = (
        f"[{new_tokens} tokens, {new_tokens / seconds:.1f} tok/s with the prompt; hits "
        f"{hit_rate:.1%}; {format_bytes(stats.bytes_read)} read, {stats.stall_s:.2f} s stalled; "
        f"experts {format_bytes(stats.peak_resident_bytes)} of {format_bytes(stats.budget_bytes)}]"
    )
    return Outcome(payload, f"{text}\n\n{summary}")


def _continue(
    model: Any, tokenizer: Any, args: argparse.Namespace, progress: Progress
) -> tuple[str, int]:
    """The text after the prompt, and its number of tokens."""
    import torch

    if args.chat:
        inputs = tokenizer.apply_chat_template(
            [{"role": "user", "content": args.prompt}],
            add_generation_prompt=True,
            return_tensors="pt",
            return_dict=True,
        )
    else:
        inputs = tokenizer(args.prompt, return_tensors="pt")
    inputs.pop("token_type_ids", None)
    torch.manual_seed(args.seed)
    sampling = {"do_sample": True, "temperature": args.temperature} if args.temperature else {}
    tokens = model.generate(
        **inputs,
        **({"do_sample": False} | sampling),
        max_new_tokens=args.max_new_tokens,
        streamer=_Counter(progress, args.max_new_tokens),
    )[0, inputs["input_ids"].shape[1] :]
    return tokenizer.decode(tokens, skip_special_tokens=True), len(tokens)
