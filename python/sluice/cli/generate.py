"""`sluice generate`: text from a local checkpoint whose experts are offloaded."""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

from sluice.cli.common import Outcome, add_budget, add_host_memory, model_folder
from sluice.errors import ConfigError
from sluice.folders import cache_folder
from sluice.limit import limit_of
from sluice.progress import Progress
from sluice.report import phase_text
from sluice.text import format_bytes

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
    parser.add_argument(
        "--device",
        default="auto",
        help="cpu, cuda:N, or auto (default): the first GPU that this build computes on, else cpu",
    )
    parser.add_argument("--policy", default="auto", help="eviction policy")
    parser.add_argument(
        "--predictor",
        metavar="FOLDER",
        action="append",
        help="what `sluice train` wrote, or a predictor's name; again for one more",
    )
    parser.add_argument(
        "--preset", help='a published system: "edgemoe" or "expertflow", beside --predictor'
    )
    parser.add_argument("--timeline", metavar="FILE", help="write a Chrome trace here")
    add_budget(parser, default=None, help_tail="no default: `sluice plan` shows what fits")
    add_host_memory(parser)
    parser.set_defaults(run=run)
    return parser


class _Watch:
    """A streamer that shows how many tokens there are, and tells the prompt from the tokens."""

    def __init__(self, session: Any, progress: Progress, total: int) -> None:
        self._session = session
        self._progress = progress
        self._total = total
        self._tokens = -1  # the prompt is put first
        self.marks: list[tuple[float, Any]] = []  # before the prompt, behind it, at the end

    def put(self, value: object) -> None:
        """`generate` calls it with the prompt first, then with each token."""
        if len(self.marks) < 2:
            self.mark()
        self._tokens += 1
        self._progress(self._tokens, self._total)

    def end(self) -> None:
        """`generate` calls it behind the last token."""
        self.mark()

    def mark(self) -> None:
        """Remembers the time and the counters."""
        self.marks.append((time.perf_counter(), self._session.stats()))


def run(args: argparse.Namespace) -> Outcome:
    """Generates."""
    folder = model_folder(args.model)
    _check(args)
    from sluice import doctor
    from sluice.config import OffloadOptions
    from sluice.hf.auto import dense_bytes_of, load_causal_lm, load_tokenizer
    from sluice.hf.devices import choose_device

    options = OffloadOptions(
        device_memory=args.device_memory,
        host_memory=args.host_memory,
        policy=args.policy,
        predictor=args.predictor,
        preset=args.preset,
    )
    device = choose_device(args.device)
    model = load_causal_lm(folder, dtype=args.dtype, offload=options, device=device)
    with model.sluice as session:
        with Progress("sluice generate", unit="tokens") as progress:
            watch = _Watch(session, progress, args.max_new_tokens)
            text, new_tokens = _continue(model, load_tokenizer(folder), args, watch)
        if args.timeline:
            session.timeline(args.timeline)
        beside_gpu = ""
        constants = doctor.load_constants(cache_folder())
        payload: dict[str, Any] = {
            "text": text,
            "new_tokens": new_tokens,
            "device": session.device,
        } | _phases(watch, new_tokens)
        if constants is not None and new_tokens > 1:
            (begin_s, begin), (end_s, end) = watch.marks[1:]
            limit = limit_of(session, end - begin, constants, dense_bytes_of(model))
            if limit is not None:
                payload["decode"] |= limit.to_dict(end_s - begin_s)
            if limit is not None and limit.h2d_s is not None:
                beside_gpu = phase_text(
                    "decode", end - begin, limit, end_s - begin_s, new_tokens - 1
                )
        payload["stats"] = session.stats().to_dict()
    return Outcome(payload, _text(payload, beside_gpu))


def _check(args: argparse.Namespace) -> None:
    """Refuses what cannot work before a model is loaded."""
    if args.max_new_tokens < 1:
        raise ConfigError(f"--max-new-tokens: got {args.max_new_tokens}, expected 1 or more")
    if args.temperature < 0:
        raise ConfigError(f"--temperature: got {args.temperature}, expected 0 or more")
    if args.timeline and not Path(args.timeline).resolve().parent.is_dir():
        raise ConfigError(f"--timeline: got {args.timeline!r}, whose folder is not there")
    if args.device_memory is None:
        raise ConfigError(
            "--device-memory: got none, expected a size such as 6GiB or 25%; "
            f"`sluice plan {args.model}` shows what each buys"
        )


def _phases(watch: _Watch, new_tokens: int) -> dict[str, Any]:
    """Prompt and tokens apart: the first token belongs to the prompt."""
    (start_s, start), (begin_s, begin), (end_s, end) = watch.marks
    phases: dict[str, Any] = {}
    for name, seconds, spent in (
        ("prompt", begin_s - start_s, begin - start),
        ("decode", end_s - begin_s, end - begin),
    ):
        phases[name] = {
            "seconds": seconds,
            "hit_rate": spent.hit_rate,
            "bytes_read": spent.bytes_read,
            "stall_s": spent.stall_s,
        }
    tokens = new_tokens - 1
    phases["decode"]["tokens_per_s"] = tokens / phases["decode"]["seconds"] if tokens else None
    return phases


def _text(payload: dict[str, Any], beside_gpu: str) -> str:
    """The text, then its cost in a few lines; `beside_gpu` takes the place of the CPU's limit."""
    prompt, decode, stats = payload["prompt"], payload["decode"], payload["stats"]
    lines = [payload["text"], ""]
    for name, phase in (("prompt", prompt), ("decode", decode)):
        rate = phase.get("tokens_per_s")
        lines.append(
            f"{name}: {phase['seconds']:.2f} s"
            + (f", {rate:.1f} tok/s" if rate else "")
            + f", hits {phase['hit_rate']:.1%}, {format_bytes(phase['bytes_read'])} read, "
            f"{phase['stall_s']:.2f} s stalled"
        )
    if beside_gpu:
        lines.append(beside_gpu)
    elif "achieved" in decode:
        lines.append(
            f"limit of decoding {decode['limit_s']:.3f} s (disk {decode['disk_s']:.3f}, experts in "
            f"memory {decode['experts_s']:.3f}, dense {decode['dense_s']:.3f}), achieved "
            f"{decode['achieved']:.2g}, bound: {decode['bound']}; constants: doctor"
            + ("; above 1, run `sluice doctor` again" if decode["achieved"] > 1 else "")
        )
    lines.append(
        f"experts: peak {format_bytes(stats['peak_resident_bytes'])} of "
        f"{format_bytes(stats['budget_bytes'])} on {payload['device']}"
    )
    return "\n".join(lines)


def _continue(
    model: Any, tokenizer: Any, args: argparse.Namespace, watch: _Watch
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
    inputs = inputs.to(model.device)
    inputs.pop("token_type_ids", None)
    torch.manual_seed(args.seed)
    sampling = {"do_sample": True, "temperature": args.temperature} if args.temperature else {}
    tokens = model.generate(
        **inputs,
        **({"do_sample": False} | sampling),
        max_new_tokens=args.max_new_tokens,
        streamer=watch,
    )[0, inputs["input_ids"].shape[1] :]
    return tokenizer.decode(tokens, skip_special_tokens=True), len(tokens)
