"""`sluice trace`: routing recorded, imported, and in figures."""

from __future__ import annotations

import argparse
import gzip
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sluice.cli.common import Outcome, add_budget, add_host_memory, model_folder
from sluice.errors import CheckpointError, ConfigError
from sluice.progress import Progress
from sluice.text import format_bytes

KINDS = ("esft", "vllm", "sglang")
ESFT_SCALE = 10_000.0  # its weights are published with four decimals


@dataclass(frozen=True, slots=True)
class _Prompt:
    text: str
    task: str


def add_parser(verbs: Any) -> argparse.ArgumentParser:
    """Registers the verb and its three."""
    parser: argparse.ArgumentParser = verbs.add_parser(
        "trace",
        help="record which experts a model routes to, import it, show it",
        description="A trace is one file: which experts each token of each layer was sent to. "
        "Predictors are trained on it and policies replayed over it.",
    )
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    for add in (_add_record, _add_import, _add_show):
        # Also behind the action; without a default, which would undo one before it.
        add(actions).add_argument(
            "--json", action="store_true", default=argparse.SUPPRESS, help="print one JSON object"
        )
    return parser


def _add_record(actions: Any) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = actions.add_parser(
        "record",
        help="generate from prompts and record the routing",
        description="Loads a local checkpoint with its experts offloaded, continues each prompt, "
        "and records the routing of all of it. The text itself is kept only with --token-ids.",
    )
    parser.add_argument("model", metavar="MODEL_DIR", nargs="?", help="a local checkpoint folder")
    parser.add_argument(
        "--reference", action="store_true", help="the model that ships with sluice, as MODEL_DIR"
    )
    parser.add_argument(
        "--prompts",
        required=True,
        type=Path,
        metavar="FILE",
        help='JSON lines {"prompt": …, "task": …} (.jsonl, .jsonl.gz), or one prompt a line',
    )
    parser.add_argument("--out", required=True, type=Path, metavar="FILE", help="the trace")
    parser.add_argument("--task", default="", help="of prompts that name none")
    parser.add_argument("--max-new-tokens", type=int, default=64, metavar="N")
    parser.add_argument(
        "--temperature", type=float, default=0.0, help="0 (default): greedy, else sampling"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the sampling")
    parser.add_argument("--device", default="auto", help="cpu, cuda:N, or auto (default)")
    parser.add_argument("--token-ids", action="store_true", help="keep token ids: the text")
    parser.add_argument("--hidden", action="store_true", help="keep states, 2 bytes a number")
    parser.add_argument(
        "--max-bytes", default="1GiB", metavar="SIZE", help="recording stops there (1GiB)"
    )
    add_budget(parser, default="25%", help_tail="default 25%%")
    add_host_memory(parser)
    parser.set_defaults(run=run_record)
    return parser


def _add_import(actions: Any) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = actions.add_parser(
        "import",
        help="read what others recorded",
        description="esft: a folder with meta.json, experts.npy.gz, weights.npy.gz. vllm, sglang: "
        "a file of the server's answers with routed experts, JSON or JSON lines.",
    )
    parser.add_argument("kind", choices=KINDS)
    parser.add_argument("path", type=Path, metavar="PATH")
    parser.add_argument("--out", required=True, type=Path, metavar="FILE", help="the trace")
    parser.add_argument("--num-experts", type=int, metavar="E", help="vllm, sglang: of a layer")
    parser.add_argument(
        "--num-layers", type=int, metavar="L", help="sglang; vllm checks it: dense ones included"
    )
    parser.add_argument("--top-k", type=int, metavar="K", help="sglang; vllm checks it")
    parser.add_argument("--task", default="", help="of all requests")
    parser.set_defaults(run=run_import)
    return parser


def _add_show(actions: Any) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = actions.add_parser(
        "show",
        help="what a trace holds: tokens by task, skew and overlap by layer",
        description="Reads a trace, checks all of it, and prints it in figures.",
    )
    parser.add_argument("file", type=Path, metavar="FILE")
    parser.set_defaults(run=run_show)
    return parser


def run_show(args: argparse.Namespace) -> Outcome:
    """Shows."""
    from sluice import trace
    from sluice.trace.describe import describe

    summary = describe(trace.load(args.file))
    return Outcome(summary.to_dict(), summary.text())


def run_import(args: argparse.Namespace) -> Outcome:
    """Imports."""
    from sluice import trace

    needed = {"vllm": ("num_experts",), "sglang": ("num_experts", "num_layers", "top_k")}
    for name in needed.get(args.kind, ()):
        if getattr(args, name) is None:
            raise ConfigError(
                f"--{name.replace('_', '-')}: got none, expected it with {args.kind}, whose "
                "answers do not say it"
            )
    if args.kind == "esft":
        found = trace.import_esft_folder(args.path)
        return _written(found, trace.save(found, args.out, weight_scale=ESFT_SCALE))
    take = {"vllm": trace.import_vllm, "sglang": trace.import_sglang}[args.kind]
    found = take(
        trace.read_responses(args.path),
        num_experts=args.num_experts,
        num_layers=args.num_layers,
        top_k=args.top_k,
        task=args.task,
    )
    return _written(found, trace.save(found, args.out))


def run_record(args: argparse.Namespace) -> Outcome:
    """Records."""
    if args.reference == (args.model is not None):
        raise ConfigError("record: got none or both of MODEL_DIR and --reference, expected one")
    if args.max_new_tokens < 1 or args.temperature < 0:
        raise ConfigError(
            f"record: got --max-new-tokens {args.max_new_tokens}, --temperature "
            f"{args.temperature}, expected at least 1 and at least 0"
        )
    if not args.out.resolve().parent.is_dir():
        raise ConfigError(f"--out: got {str(args.out)!r}, whose folder is not there")
    prompts = _read_prompts(args.prompts, args.task)
    from sluice import trace
    from sluice.config import OffloadOptions
    from sluice.hf.auto import load_causal_lm, load_tokenizer
    from sluice.hf.devices import choose_device
    from sluice.reference import reference_model

    folder = reference_model() if args.reference else model_folder(args.model)
    options = OffloadOptions(device_memory=args.device_memory, host_memory=args.host_memory)
    device = choose_device(args.device)
    model = load_causal_lm(folder, offload=options, device=device)
    tokenizer = load_tokenizer(folder)
    with (
        model.sluice as session,
        session.record(
            token_ids=args.token_ids, hidden=args.hidden, max_bytes=args.max_bytes
        ) as recorder,
        Progress("sluice trace record", unit="prompts") as progress,
    ):
        for done, prompt in enumerate(prompts):
            recorder.task = prompt.task
            text = f"<|bos|>{prompt.text}<|sep|>" if args.reference else prompt.text
            _continue(model, tokenizer, text, args, args.seed + done)
            progress(done + 1, len(prompts))
        found = recorder.trace()
        truncated = session.stats().degradations.get("trace_truncated", 0)
    path = trace.save(found, args.out, max_bytes=args.max_bytes)
    return _written(found, path, truncated)


def _continue(model: Any, tokenizer: Any, text: str, args: argparse.Namespace, seed: int) -> None:
    import torch

    inputs = tokenizer(text, return_tensors="pt").to(model.device)
    inputs.pop("token_type_ids", None)
    torch.manual_seed(seed)
    sampling = {"do_sample": True, "temperature": args.temperature} if args.temperature else {}
    model.generate(
        **inputs, **({"do_sample": False} | sampling), max_new_tokens=args.max_new_tokens
    )


def _read_prompts(file: Path, task: str) -> list[_Prompt]:
    """Prompts of a file.

    Raises:
        CheckpointError: There is none, or a line is not what its name says.
    """
    try:
        raw = gzip.decompress(file.read_bytes()) if file.suffix == ".gz" else file.read_bytes()
        lines = [line for line in raw.decode("utf-8").splitlines() if line.strip()]
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{file}: got no readable prompts: {error}") from None
    if not lines:
        raise CheckpointError(f"{file}: got no prompts, expected at least one line")
    if ".jsonl" not in file.suffixes:
        return [_Prompt(line, task) for line in lines]
    prompts: list[_Prompt] = []
    for number, line in enumerate(lines, 1):
        try:
            fields = json.loads(line)
            prompts.append(_Prompt(fields["prompt"] + "", fields.get("task", task) + ""))
        except (ValueError, TypeError, KeyError) as error:
            raise CheckpointError(
                f'{file}:{number}: got no {{"prompt": "…"}}: {type(error).__name__} {error}'
            ) from None
    return prompts


def _written(found: Any, path: Path, truncated: int = 0) -> Outcome:
    size = path.stat().st_size
    payload = {
        "trace": str(path),
        "bytes": size,
        "sequences": len(found.sequences),
        "tokens": found.num_tokens,
        "model": found.model,
        "truncated_forwards": truncated,
    }
    tail = f"; cut short, {truncated} forwards are not in it" if truncated else ""
    return Outcome(
        payload,
        f"{path}: {found.num_tokens:,} tokens of {len(found.sequences):,} sequences, "
        f"{format_bytes(size)}{tail}",
    )
