"""Routing of the reference model's own text: three traces, recorded through sluice.

`train`, `valid` and `test` are what the model writes to prompts of the three splits, of which
`train` is memorised: fit on the first, choose on the second, score on the third. Text is sampled
(greedy text of so small a model loops), each prompt with a seed of its own, so a trace does not
depend on what ran before. With `--hidden` the states that entered each layer's experts are kept.

Traces lie in $SLUICE_BENCH_DIR by a hash of the prompts, the model and the settings; the three
without states are shipped in `benchmarks/data`.
"""

import argparse
import gzip
import hashlib
import json
import sys
from dataclasses import dataclass, replace
from pathlib import Path

from sluice import trace
from sluice.errors import CheckpointError
from sluice.folders import bench_folder
from sluice.progress import Progress

DATA = Path(__file__).parent / "data"
PROMPTS = DATA / "reference_prompts.jsonl.gz"
ROLES = ("train", "valid", "test")
DEVICE_MEMORY = "25%"
TEMPERATURE = 0.8
MAX_NEW_TOKENS = 96
MAX_BYTES = "4GiB"


@dataclass(frozen=True, slots=True)
class Prompt:
    """One request: `opening` is what its answer must begin with, for running text."""

    role: str
    task: str
    source: str
    prompt: str
    opening: str = ""

    @property
    def text(self) -> str:
        return f"<|bos|>{self.prompt}<|sep|>{self.opening}"

    @property
    def seed(self) -> int:
        return int(hashlib.sha256(f"{self.role}/{self.text}".encode()).hexdigest()[:8], 16)


def prompts(role: str) -> list[Prompt]:
    """The prompts of one role, in the order of the file."""
    with gzip.open(PROMPTS, "rt", encoding="utf-8") as file:
        found = [Prompt(**json.loads(line)) for line in file]
    return [prompt for prompt in found if prompt.role == role]


def shipped(role: str) -> trace.Trace:
    """The trace that is in the tree: token ids, weights, no states."""
    return trace.load(DATA / f"reference_{role}{trace.SUFFIX}")


def recorded(role: str, *, hidden: bool = False, every: int = 1) -> Path:
    """The file of one role's trace, of every so many requests, recorded now unless it is there."""
    folder = bench_folder() / "traces"
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"reference_{role}-{_key(hidden, every)}{trace.SUFFIX}"
    try:
        trace.load(path)
    except CheckpointError:  # not there, or not whole
        trace.save(record(prompts(role)[::every], hidden=hidden), path, max_bytes=MAX_BYTES)
    return path


def record(requests: list[Prompt], *, hidden: bool = False) -> trace.Trace:
    """What the reference model routes while it answers, one request after the other."""
    import torch

    from sluice.config import OffloadOptions
    from sluice.hf.auto import load_causal_lm, load_tokenizer
    from sluice.reference import reference_model

    torch.set_num_threads(1)
    folder = reference_model()
    tokenizer = load_tokenizer(folder)
    model = load_causal_lm(folder, offload=OffloadOptions(device_memory=DEVICE_MEMORY))
    options = {"token_ids": True, "hidden": hidden, "max_bytes": MAX_BYTES}
    with (
        model.sluice as session,
        Progress("recording", unit="requests") as bar,
        session.record(**options) as recorder,
    ):
        for done, request in enumerate(requests):
            recorder.task = request.task
            ids = tokenizer(request.text, return_tensors="pt")["input_ids"]
            torch.manual_seed(request.seed)
            model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                do_sample=True,
                temperature=TEMPERATURE,
                max_new_tokens=MAX_NEW_TOKENS,
            )
            bar(done + 1, len(requests))
        found = recorder.trace()
    if len(found.sequences) != len(requests):
        raise RuntimeError(f"got {len(found.sequences)} sequences of {len(requests)} requests")
    named = [
        replace(sequence, request=f"{request.role}/{i} {request.source}")
        for i, (sequence, request) in enumerate(zip(found.sequences, requests, strict=True))
    ]
    source = f"reference model, own text, temperature {TEMPERATURE}; {found.source}"
    return replace(found, sequences=tuple(named), source=source)


def _key(hidden: bool, every: int) -> str:
    from sluice.reference import reference_model

    parts = [
        hashlib.sha256(PROMPTS.read_bytes()).hexdigest(),
        (reference_model() / "SHA256SUMS").read_text(),
        json.dumps([TEMPERATURE, MAX_NEW_TOKENS, DEVICE_MEMORY, hidden, every]),
    ]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("roles", nargs="*", default=ROLES, choices=[*ROLES, []])
    parser.add_argument("--hidden", action="store_true", help="keep states, 3 KB a token")
    arguments = parser.parse_args()
    for role in arguments.roles:
        sys.stdout.write(f"{recorded(role, hidden=arguments.hidden)}\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
