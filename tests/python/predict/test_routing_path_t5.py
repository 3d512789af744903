"""ExpertFlow's T5: its size, its cache, what it reads, and what it can learn by heart."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch

from predict.small_traces import random_trace
from sluice.errors import CheckpointError, ConfigError
from sluice.hf.t5 import new_t5
from sluice.predict import make
from sluice.predict.networks.routing_path_t5 import (
    PathPast,
    RoutingPathT5Settings,
    T5PathNet,
    count_parameters,
)
from sluice.predict.offline import drive
from sluice.trace import Trace, TraceSequence

TINY: dict[str, Any] = {
    **{"width": 16, "inner": 32, "layers": 2, "heads": 2, "head_width": 8},
    **{"table_rows": 256, "source_tokens": 6, "window": 9},
}


def tiny_net(**more: Any) -> T5PathNet:
    torch.manual_seed(0)
    return T5PathNet(RoutingPathT5Settings(**{**TINY, **more}), 3, 8).eval()


def ids_for(*shape: int) -> torch.Tensor:
    return torch.randint(0, 200, shape, generator=torch.Generator().manual_seed(1))


def test_the_default_size_is_the_paper_s_but_for_the_tables() -> None:
    ours = T5PathNet(RoutingPathT5Settings(), 8, 32)
    assert ours.head.weight.shape == (8 * 32, 32) and ours.head.bias is None
    paper = new_t5(
        **{"vocabulary": 32_128, "width": 32, "inner": 2048},
        **{"layers": 6, "heads": 8, "head_width": 64, "dropout": 0.1},
    )
    assert sum(p.numel() for p in paper.parameters()) == 3_782_144
    assert count_parameters(ours) == 3_782_144 + (2 * 16_384 - 32_128) * 32
    held = sum(t.numel() for t in ours.state_dict().values())
    assert held == count_parameters(ours) + ours.head.weight.numel(), "a table is saved twice"


@pytest.mark.parametrize("window", [1, 5, 40])
def test_tokens_one_by_one_are_tokens_at_once(window: int) -> None:
    net, ids = tiny_net(window=window), ids_for(2, 31)
    with torch.no_grad():
        whole, end = net(ids, PathPast())
        past, parts = PathPast(), []
        for part in ids.split([1, 1, 9, 1, 1, 11, 1, 6], 1):  # the third holds row source_tokens
            logits, past = net(part, past)
            parts.append(logits)
    torch.testing.assert_close(torch.cat(parts, 1), whole, atol=1e-5, rtol=0)
    assert past.tokens == end.tokens == 31
    assert past.own[0][0].shape[2] == min(window - 1, 31) and past.cross[0][0].shape[2] == 7


def test_the_full_sized_net_is_the_same_live_and_offline() -> None:
    predictor = make("routing-path-t5", {"epochs": 1})
    predictor.fit(random_trace(1, sequences=(50, 30)))
    assert predictor.parameters == predictor.fitting.notes["parameters"] == 3_802_624
    text = random_trace(2, sequences=(40, 3))
    np.testing.assert_allclose(
        predictor.scores(text, "token"), drive(predictor, text, "token"), atol=1e-5
    )


def test_a_row_reads_no_id_after_its_own() -> None:
    net, ids = tiny_net(window=40), ids_for(1, 20)
    with torch.no_grad():
        before = net(ids, PathPast())[0][0]
        for row in range(20):
            other = ids.clone()
            other[0, row:] += 1
            changed = (net(other, PathPast())[0][0] != before).any(-1)
            assert not changed[:row].any() and changed[row:].all(), row


def test_the_encoder_is_read_once_all_its_tokens_have_passed() -> None:
    """With a window of one the encoder alone tells a row of ids before its own."""
    net, ids = tiny_net(window=1), ids_for(1, 12)
    other = ids.clone()
    other[0, 0] += 1
    with torch.no_grad():
        reached = (net(ids, PathPast())[0] != net(other, PathPast())[0]).any(-1)[0]
    assert reached.tolist() == [True] + 5 * [False] + 6 * [True]


def test_padding_changes_nothing() -> None:
    net, ids = tiny_net(), ids_for(4, 24)
    lengths = [24, 13, 5, 1]
    for row, length in enumerate(lengths):
        ids[row, length:] = -1
    with torch.no_grad():
        together, _ = net(ids, PathPast())
        for row, length in enumerate(lengths):
            alone, _ = net(ids[row : row + 1, :length], PathPast())
            torch.testing.assert_close(together[row, :length], alone[0], atol=1e-5, rtol=0)


def test_an_unknown_id_stands_for_nothing() -> None:
    net = tiny_net()
    unknown, start, last = net._embed(torch.tensor([-1, -2, 2**31 - 1]))
    assert not unknown.any() and start.all() and last.all() and not torch.equal(start, last)
    with torch.no_grad():
        first, other = (net(torch.tensor([[3, token, 4]]), PathPast())[0] for token in (-1, 49))
    assert torch.equal(first[:, 0], other[:, 0]) and not torch.equal(first[:, 1:], other[:, 1:])


def test_later_stretches_train_on_the_source_that_scores_read() -> None:
    """With a window of one a row reads its own id and the source, wherever a sequence is cut."""
    predictor = make("routing-path-t5", {**TINY, "window": 1, "epochs": 1})
    predictor.fit(random_trace(1))
    text = random_trace(2, sequences=(30, 20, 3))
    text = dataclasses.replace(  # all of it prompts, of which nothing is left out
        text,
        sequences=tuple(dataclasses.replace(s, prompt_tokens=s.length) for s in text.sequences),
    )
    # Some begin before row source_tokens, some behind it, and one sequence ends before it.
    pieces = [
        *((0, slice(0, 4)), (0, slice(4, 9)), (0, slice(9, 30))),
        *((1, slice(30, 42)), (1, slice(42, 50)), (2, slice(50, 53))),
    ]
    with torch.no_grad():
        missed = float(predictor._lesson(text)(pieces, np.random.default_rng(0)))
    likely = predictor.scores(text, "token")
    used = (text.experts[..., None] == np.arange(text.num_experts)).any(-2)
    expected = -np.where(used, np.log(likely), np.log1p(-likely)).sum() / text.num_tokens
    assert missed == pytest.approx(expected, rel=1e-5)


def test_it_learns_eight_sequences_by_heart() -> None:
    """Routes are random, and ids come again elsewhere with others: an id alone says little."""
    rng = np.random.default_rng(0)
    lengths = (16, 12, 14, 16, 10, 13, 15, 16)
    starts = np.cumsum([0, *lengths[:-1]])
    total = sum(lengths)
    trace = Trace(
        experts=np.argsort(rng.random((total, 2, 8)), -1)[..., :2].astype(np.int16),
        num_experts=8,
        sequences=tuple(
            TraceSequence(int(start), length, prompt_tokens=4, content=str(start))
            for start, length in zip(starts, lengths, strict=True)
        ),
        token_ids=rng.integers(0, 40, total).astype(np.int32),
    )
    predictor = make(
        "routing-path-t5",
        {
            **{"width": 32, "inner": 128, "layers": 2, "heads": 4, "head_width": 16},
            **{"source_tokens": 4, "dropout": 0.0, "weight_decay": 0.0},
            **{"epochs": 250, "learning_rate": 1e-2, "batch_tokens": 120},
        },
    )
    predictor.fit(trace)
    best = np.argsort(-predictor.scores(trace, "token"), -1)[..., :2]
    recall = (best[..., None] == trace.experts[..., None, :]).any(-1).mean()
    assert recall > 0.99, recall


def test_it_keeps_the_epoch_that_others_liked_best() -> None:
    predictor = make("routing-path-t5", {**TINY, "epochs": 6, "learning_rate": 3e-2})
    calls: list[tuple[int, int]] = []
    others = random_trace(2)
    predictor.fit(random_trace(1), others, progress=lambda done, total: calls.append((done, total)))
    notes = predictor.fitting.notes
    assert calls == [(epoch, 6) for epoch in range(1, 7)]
    assert len(notes["loss"]) == 6 and notes["loss"][-1] < notes["loss"][0]
    assert notes["best_epoch"] == int(np.argmin(notes["choose_loss"]))
    likely = np.clip(predictor.scores(others, "token"), 1e-6, 1 - 1e-6)
    used = (others.experts[..., None] == np.arange(8)).any(-2)
    loss = -np.where(used, np.log(likely), np.log1p(-likely)).mean()
    assert loss == pytest.approx(min(notes["choose_loss"]), rel=1e-4)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *(("width", 0), ("inner", 0), ("layers", 0), ("heads", -1), ("head_width", 0)),
        *(("table_rows", 0), ("source_tokens", 0), ("window", 0)),
        *(("dropout", 1.0), ("epochs", 0), ("sequence_tokens", 0), ("batch_tokens", 0)),
        *(("learning_rate", 0.0), ("weight_decay", -1.0)),
    ],
)
def test_settings_that_cannot_work_are_refused(field: str, value: float) -> None:
    with pytest.raises(ConfigError, match=rf"^{field}: got {value!r}"):
        make("routing-path-t5", {field: value})


def test_a_state_of_another_size_is_refused() -> None:
    predictor = make("routing-path-t5", {**TINY, "epochs": 1})
    predictor.fit(random_trace(1))
    arrays = {**predictor.state()}
    arrays["head.weight"] = arrays["head.weight"][:, 1:]
    with pytest.raises(CheckpointError, match=r"got head\.weight"):
        predictor.load_state(arrays)
