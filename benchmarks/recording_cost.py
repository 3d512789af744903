"""What recording costs: decode of the reference model at 25 %, with and without, in alternation.

    python benchmarks/recording_cost.py [--pairs N] [--hidden]

Prints the median of each arm and of the pairs' ratios, by the clock and by the caller's own CPU
time; the latter does not see what other processes do to the machine.
"""

import argparse
import statistics
import sys
import time

import torch

from sluice.config import OffloadOptions
from sluice.hf.auto import load_causal_lm, load_tokenizer
from sluice.reference import reference_model, reference_prompts

NEW_TOKENS = 48


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=24)
    parser.add_argument("--hidden", action="store_true", help="keep states, too")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    folder = reference_model()
    model = load_causal_lm(folder, offload=OffloadOptions(device_memory="25%"))
    prompt = load_tokenizer(folder)(reference_prompts()[0].text, return_tensors="pt")["input_ids"]

    def decode() -> tuple[float, float]:
        """(seconds, seconds of this thread's CPU) of a token."""
        clock, cpu = time.perf_counter(), time.thread_time()
        model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            do_sample=False,
            max_new_tokens=NEW_TOKENS,
            min_new_tokens=NEW_TOKENS,
        )
        spent = time.perf_counter() - clock, time.thread_time() - cpu
        return spent[0] / NEW_TOKENS, spent[1] / NEW_TOKENS

    def recorded() -> tuple[float, float]:
        with model.sluice.record(token_ids=True, hidden=arguments.hidden):
            return decode()

    decode(), recorded()
    off: list[tuple[float, float]] = []
    on: list[tuple[float, float]] = []
    for pair in range(arguments.pairs):
        if pair % 2:
            on.append(recorded())
            off.append(decode())
        else:
            off.append(decode())
            on.append(recorded())
    for kind, name in enumerate(("clock", "CPU of the caller")):
        without, with_it = ([sample[kind] for sample in arm] for arm in (off, on))
        ratio = statistics.median(b / a for a, b in zip(without, with_it, strict=True))
        more = statistics.median(b - a for a, b in zip(without, with_it, strict=True))
        sys.stdout.write(
            f"{name}: {statistics.median(without) * 1e3:.3f} ms a token without, "
            f"{statistics.median(with_it) * 1e3:.3f} with; median of {arguments.pairs} pairs: "
            f"x {ratio:.4f}, {more * 1e6:+.0f} us\n"
        )
    model.sluice.close()


if __name__ == "__main__":
    main()
