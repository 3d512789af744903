"""The calls of an evaluation harness (lm-eval's HFLM): padded batches, log-softmax, greedy match.

The harness itself is not installed here; these are the calls that it makes on a model.
"""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer

import sluice

REQUESTS = [
    ("Classify the intent: what is the weather like today", " weather"),
    ("Translate to French: I am happy.", " Je suis content."),
    ("Is this positive or negative: I love it", " positive"),
    ("What is 2 + 2?", " 4"),
    ("", " The king"),
]


def loglikelihoods(model: torch.nn.Module, tokenizer: object) -> list[tuple[float, bool]]:
    """Per request the sum of log-probabilities of the continuation, and whether greedy gives it."""
    encoded = []
    for context, continuation in REQUESTS:
        left = tokenizer(f"<|bos|>{context}<|sep|>", add_special_tokens=False)["input_ids"]
        right = tokenizer(continuation, add_special_tokens=False)["input_ids"]
        encoded.append((left, right))
    longest = max(len(a) + len(b) - 1 for a, b in encoded)
    rows = [F.pad(torch.tensor((a + b)[:-1]), (0, longest - len(a + b) + 1)) for a, b in encoded]
    with torch.inference_mode():
        logits = F.log_softmax(model(torch.stack(rows)).logits.float(), dim=-1)
    results = []
    for row, (left, right) in zip(logits, encoded, strict=True):
        span = row[len(left) - 1 : len(left) + len(right) - 1]
        wanted = torch.tensor(right)
        total = span.gather(1, wanted[:, None]).sum()
        results.append((float(total), bool((span.argmax(-1) == wanted).all())))
    return results


@pytest.fixture(scope="module")
def path() -> Path:
    return Path(sluice.reference_model())


@pytest.fixture(scope="module")
def stock(path: Path) -> list[tuple[float, bool]]:
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    return loglikelihoods(model, AutoTokenizer.from_pretrained(path))


@pytest.mark.parametrize("device_memory", ["3%", "25%", "100%"])
def test_loglikelihoods_are_the_stock_models(
    path: Path, stock: list[tuple[float, bool]], device_memory: str
) -> None:
    config = sluice.OffloadConfig(device_memory=device_memory)
    model = AutoModelForCausalLM.from_pretrained(
        path, dtype=torch.float32, quantization_config=config
    )
    found = loglikelihoods(model, AutoTokenizer.from_pretrained(path))
    again = loglikelihoods(model, AutoTokenizer.from_pretrained(path))
    model.sluice.close()
    assert found == again  # bit for bit, whatever the cache held
    # fp32 sums of about 20 log-probabilities of magnitude 10 behind 8 layers of width 192.
    tolerance = torch.finfo(torch.float32).eps * (192 * 8) ** 0.5 * 200
    for (total, greedy), (expected, expected_greedy) in zip(found, stock, strict=True):
        assert total == pytest.approx(expected, abs=tolerance)
        assert greedy == expected_greedy
