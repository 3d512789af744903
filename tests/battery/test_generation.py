"""What users do with a model: padded batches, beams, several prompts, a second `generate`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import nn

from .cells import Bench
from .tally import NOTES
from .test_models import OFFLOADED, assert_restored

CELL = {"slots": "quarter", "policy": "decayed-lfu", "backing": "spilled", "dtype": "fp32"}
PAD, PADDING = 0, 2
GREEDY = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
Generate = Callable[[nn.Module, Bench], torch.Tensor]


def left_padded(model: nn.Module, bench: Bench) -> torch.Tensor:
    ids = bench.ids.clone()
    mask = torch.ones_like(ids)
    ids[0, :PADDING], mask[0, :PADDING] = PAD, 0
    return _generate(model, ids, attention_mask=mask)


def beams(model: nn.Module, bench: Bench) -> torch.Tensor:
    return _generate(model, bench.ids, num_beams=3)


def several_prompts(model: nn.Module, bench: Bench) -> torch.Tensor:
    batch = _generate(model, torch.cat([bench.ids, bench.ids.flip(1)]))
    one_by_one = [_generate(model, bench.ids[i : i + 1]) for i in range(bench.ids.shape[0])]
    return torch.cat([batch, *one_by_one])


def second_time(model: nn.Module, bench: Bench) -> torch.Tensor:
    first, second = _generate(model, bench.ids), _generate(model, bench.ids)
    assert torch.equal(first, second)
    return second


def _generate(model: nn.Module, ids: torch.Tensor, **kwargs: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.generate(ids, pad_token_id=PAD, **GREEDY, **kwargs)


@pytest.fixture(scope="module")
def offloaded_bench(bench_of: Callable[[str], Bench]) -> Callable[[str], Any]:
    @contextmanager
    def offload(family: str) -> Iterator[tuple[Bench, nn.Module]]:
        bench = bench_of(family)
        with bench.offloaded(CELL) as model:
            yield bench, model
        assert_restored(bench, "fp32")

    return offload


@pytest.mark.parametrize("way", [left_padded, beams, several_prompts, second_time])
@pytest.mark.parametrize("family", OFFLOADED)
def test_tokens_are_the_stock_models(
    family: str, way: Generate, bench_of: Callable[[str], Bench], offloaded_bench: Any
) -> None:
    bench = bench_of(family)
    try:
        expected = way(bench.stock("fp32"), bench)
    except (RuntimeError, ValueError, NotImplementedError, IndexError, TypeError) as error:
        NOTES.append(f"{way.__name__}: stock {family} itself fails: {error}"[:160])
        return
    with offloaded_bench(family) as (_, model):
        assert torch.equal(way(model, bench), expected)
