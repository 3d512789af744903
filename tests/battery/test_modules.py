"""Each experts class alone: HF's own eager body against the offloaded module.

Stock's answer to a sentinel is made here, with id 0 at weight 0: what HF does with an id of
`num_experts` depends on its version and on expert parallelism.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import pytest
import torch
from torch import nn

from .cells import DTYPES
from .families import build_experts
from .scan import DecoratedClass, scan
from .tally import COUNTS
from .test_coverage import NOT_BUILT
from .tolerance import experts_tolerance

TOKENS = (0, 1, 2, 33)
TOP_K = (1, 2, 4)
SLOTS = (1, 3, 8)
ENTRIES = [entry for entry in scan() if entry.key not in NOT_BUILT["modules"]]


class Holder(nn.Module):
    """The smallest model: one experts module and nothing else."""

    def __init__(self, experts: nn.Module) -> None:
        super().__init__()
        self.experts = experts


@dataclass(frozen=True, slots=True)
class Call:
    """Arguments of one experts call, and where its sentinels are."""

    hidden: torch.Tensor
    ids: torch.Tensor
    weights: torch.Tensor
    sentinel: torch.Tensor

    def for_sluice(self, num_experts: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        ids = self.ids.masked_fill(self.sentinel, num_experts)
        return self.hidden, ids, self.weights  # a sentinel counts nothing, whatever its weight

    def for_stock(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return self.hidden, self.ids, self.weights.masked_fill(self.sentinel, 0)


def calls(module: nn.Module, dtype: torch.dtype) -> Iterator[Call]:
    """T x K x weights in fp32 and in the model's dtype, with ids that repeat within a row."""
    num_experts, hidden = module.down_proj.shape[0], _hidden(module)
    generator = torch.Generator().manual_seed(11)
    for tokens, top_k, kind in itertools.product(TOKENS, TOP_K, (torch.float32, dtype)):
        ids = torch.randint(num_experts, (tokens, top_k), generator=generator)
        yield Call(
            hidden=torch.randn(tokens, hidden, generator=generator).to(dtype),
            ids=ids,
            weights=torch.rand(tokens, top_k, generator=generator).to(kind),
            sentinel=torch.rand(tokens, top_k, generator=generator) < 0.2,
        )


@torch.no_grad()
def stock(module: nn.Module, call: Call) -> torch.Tensor:
    return type(module).forward.__wrapped__(module, *call.for_stock())


@contextmanager
def offloaded(module: nn.Module, slots: int) -> Iterator[nn.Module]:
    import sluice

    holder = Holder(module).eval()
    num_experts = module.down_proj.shape[0]
    share = f"{100 * (slots + 0.5) / num_experts:.4f}%" if slots < num_experts else "100%"
    with sluice.offload(holder, device_memory=share, backing="ram", policy="lru"):
        yield holder.experts


def _hidden(module: nn.Module) -> int:
    return module.down_proj.shape[2 if module.is_transposed else 1]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: entry.key)
def test_offloaded_experts_compute_what_eager_computes(entry: DecoratedClass, dtype: str) -> None:
    module = build_experts(entry, DTYPES[dtype])
    num_experts, hidden = module.down_proj.shape[0], _hidden(module)
    inter = module.down_proj.numel() // num_experts // hidden
    known = [(call, stock(module, call)) for call in calls(module, DTYPES[dtype])]
    bits: list[torch.Tensor] = []
    for slots in SLOTS:
        with offloaded(module, slots) as experts, torch.no_grad():
            got = [experts(*call.for_sluice(num_experts)) for call, _ in known]
        bits = bits or got
        assert all(torch.equal(mine, first) for mine, first in zip(got, bits, strict=True)), slots
    for mine, (call, theirs) in zip(bits, known, strict=True):
        assert (mine.dtype, mine.shape) == (theirs.dtype, theirs.shape)
        if mine.numel():
            allowed = experts_tolerance(
                DTYPES[dtype],
                hidden=hidden,
                inter=inter,
                top_k=call.ids.shape[1],
                magnitude=theirs.abs().max().item(),
            )
            assert (mine.float() - theirs.float()).abs().max().item() <= allowed
    COUNTS["experts calls compared with eager"] += len(known) * len(SLOTS)


def test_the_calls_hold_repeated_ids_and_sentinels() -> None:
    made = list(calls(build_experts(ENTRIES[0], torch.bfloat16), torch.bfloat16))
    repeats = [c for c in made if any(len(set(row)) < len(row) for row in c.ids.tolist())]
    assert repeats
    assert any(bool(call.sentinel.any()) for call in made)
    assert {call.ids.shape for call in made} == set(itertools.product(TOKENS, TOP_K))


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: entry.key)
def test_a_wrong_expert_is_seen_by_the_comparison(entry: DecoratedClass) -> None:
    """The control: shifting every id by one changes the output by more than the tolerance."""
    module = build_experts(entry, torch.float32)
    num_experts, hidden = module.down_proj.shape[0], _hidden(module)
    call = list(calls(module, torch.float32))[-1]
    shifted = Call(call.hidden, (call.ids + 1) % num_experts, call.weights, call.sentinel)
    right, wrong = stock(module, call), stock(module, shifted)
    allowed = experts_tolerance(
        torch.bfloat16,
        hidden=hidden,
        inter=module.down_proj.numel() // num_experts // hidden,
        top_k=call.ids.shape[1],
        magnitude=right.abs().max().item(),
    )
    assert (right - wrong).abs().max().item() > allowed
