"""What the trained predictors learn from texts that were made for it, and how they are fitted."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch

from predict.small_traces import random_trace
from sluice.errors import CheckpointError, ConfigError
from sluice.predict import RoutingEvent, make
from sluice.predict.networks.causal import Causal, Past
from sluice.predict.networks.misses import misses
from sluice.predict.networks.routing_path import RoutingPath, _Table
from sluice.predict.networks.token_network import hashed
from sluice.predict.offline import Horizon
from sluice.trace import Trace, TraceSequence

SMALL: dict[str, dict[str, Any]] = {
    "forecaster": {"epochs": 40, "hidden": 16, "units": 8, "learning_rate": 1e-2},
    "layer-mlp": {"epochs": 20, "hidden": 24, "units": 8, "learning_rate": 1e-2},
    "state-mlp": {"epochs": 40, "hidden": 32, "units": 8, "learning_rate": 1e-2},
    "routing-path": {
        **{"epochs": 50, "width": 32, "layers": 2, "heads": 2, "window": 16},
        **{"sequence_tokens": 30, "learning_rate": 1e-2},
    },
    "prompt-encoder": {
        **{"batches": 80, "width": 32, "layers": 2, "heads": 2, "period": 1},
        **{"learning_rate": 3e-3},
    },
}


def trace_of(routes: Any, lengths: Any, *, experts: int = 12, **more: Any) -> Trace:
    starts = np.cumsum([0, *lengths[:-1]])
    tasks = more.pop("tasks", ("",) * len(lengths))
    spans = tuple(
        TraceSequence(int(start), int(length), task=task, content=f"{start}{length}")
        for start, length, task in zip(starts, lengths, tasks, strict=True)
    )
    return Trace(experts=np.asarray(routes, np.int16), num_experts=experts, sequences=spans, **more)


def phrases(seed: int, sequences: int) -> Trace:
    """Five phrases in a round, begun anywhere: what comes back soon is in them, not in counts."""
    shared = np.random.default_rng(77)
    phrase = np.argsort(shared.random((5, 8, 2, 12)), -1)[..., :3]
    rng = np.random.default_rng(seed)
    rounds = [(rng.integers(5) + np.arange(5)) % 5 for _ in range(sequences)]
    return trace_of(phrase[np.concatenate(rounds)].reshape(-1, 2, 3), [40] * sequences)


def belady(trace: Trace) -> Any:
    """Keep-scores that know the future."""
    scores = np.zeros((*trace.experts.shape[:2], trace.num_experts, 1))
    ahead = np.full(scores.shape[1:3], 10**6)
    for row in range(trace.num_tokens - 1, -1, -1):
        scores[row, :, :, 0] = -ahead
        ahead = ahead + 1
        np.put_along_axis(ahead, trace.experts[row].astype(np.int64), 1, -1)
    return scores


def recency(trace: Trace) -> Any:
    scores = np.zeros((*trace.experts.shape[:2], trace.num_experts, 1))
    last = np.full(scores.shape[1:3], -1)
    for row in range(trace.num_tokens):
        np.put_along_axis(last, trace.experts[row].astype(np.int64), row, -1)
        scores[row, :, :, 0] = last
    return scores


def test_a_forecaster_closes_most_of_the_gap_where_text_repeats() -> None:
    forecaster = make("forecaster", SMALL["forecaster"])
    forecaster.fit(phrases(0, 14))
    text = phrases(2, 6)
    for capacity in (2, 3, 6):
        kept = forecaster.keep_scores_of(text, [capacity])[0][..., None]
        lru, best, ours = (
            int(misses(text.experts, scores, capacity)[0])
            for scores in (recency(text), belady(text), kept)
        )
        assert (lru - ours) / (lru - best) > 0.6, (capacity, lru, ours, best)


def test_a_forecaster_says_what_it_chose() -> None:
    forecaster = make("forecaster", SMALL["forecaster"])
    calls: list[tuple[int, int]] = []
    forecaster.fit(
        phrases(0, 8), phrases(1, 3), progress=lambda done, total: calls.append((done, total))
    )
    notes = forecaster.fitting.notes
    assert calls == [(epoch, 40) for epoch in range(1, 41)]
    assert len(notes["loss"]) == 40 and notes["loss"][-1] < notes["loss"][0]
    assert notes["best_epoch"] == int(np.argmin(notes["choose_misses"]))
    assert [*notes["discounts"]] == ["0.125", "0.25", "0.5"]


def test_a_forecaster_ranks_for_the_capacity_it_is_told() -> None:
    forecaster = make("forecaster", SMALL["forecaster"])
    forecaster.fit(phrases(0, 6))
    text = phrases(3, 1)
    narrow, wide = forecaster.keep_scores_of(text, [1, 6])
    assert not np.array_equal(narrow, wide)
    forecaster.capacity = 6
    np.testing.assert_array_equal(forecaster.keep_scores(text), wide)


def test_a_forecaster_joins_what_several_requests_will_use() -> None:
    forecaster = make("forecaster", SMALL["forecaster"])
    forecaster.fit(phrases(0, 6))
    text = phrases(4, 2)

    def run(*starts: int) -> Any:
        forecaster.reset()
        requests = np.arange(len(starts))
        for step in range(3):
            rows = np.array(starts) + step
            forecaster.begin_step(step, requests, None, ())
            for layer in range(2):
                event = RoutingEvent(
                    step=step, layer=layer, experts=text.experts[rows, layer], requests=requests
                )
                forecaster.observe(event)
        return forecaster.forecast()

    together = run(0, 40)
    assert together.shape == (2, 12) and together.dtype == np.float32
    assert (together >= run(0) - 0.2).all() and together.max() <= 1


def test_a_layer_mlp_learns_what_layers_do_to_each_other() -> None:
    """Layer s + 1 uses the images of layer s's experts under a fixed map."""
    image = np.argsort(np.random.default_rng(5).random((3, 12)), -1)

    def text(seed: int) -> Trace:
        rng = np.random.default_rng(seed)
        routes = [np.argsort(rng.random((400, 12)), -1)[:, :3]]
        for layer in range(3):
            routes.append(image[layer][routes[-1]])
        return trace_of(np.stack(routes, 1), [40] * 10)

    mlp = make("layer-mlp", SMALL["layer-mlp"])
    mlp.fit(text(0), text(1))
    held = text(2)
    scores = mlp.scores(held, 1)
    assert recall(scores[:, 1:], held.experts[:, 1:]) > 0.9
    two_ahead = mlp.scores(held, 2)
    assert recall(two_ahead[:, 2:], held.experts[:, 2:]) > 0.8
    assert recall(mlp.scores(held, "token"), held.experts) < 0.5, "nothing tells before the token"


@pytest.mark.parametrize(("source", "horizon"), [("layer before", 1), ("token before", "token")])
def test_a_state_mlp_reads_states(source: str, horizon: Horizon) -> None:
    """Routes are those of a gate on one state; ids and routes before say nothing."""
    gates = np.random.default_rng(6).normal(size=(3, 12, 10))

    def text(seed: int) -> Trace:
        rng = np.random.default_rng(seed)
        hidden = rng.normal(size=(600, 3, 10)).astype(np.float16)
        if source == "layer before":
            read = np.concatenate([rng.normal(size=(600, 1, 10)), hidden[:, :-1]], 1)
        else:
            read = np.concatenate([rng.normal(size=(1, 3, 10)), hidden[:-1]])
        routes = np.argsort(-np.einsum("nsh,seh->nse", read, gates), -1)[..., :2]
        return trace_of(routes, [60] * 10, hidden=hidden)

    mlp = make("state-mlp", SMALL["state-mlp"])
    mlp.fit(text(0))
    held = text(1)
    assert recall(mlp.scores(held, horizon)[:, 1:], held.experts[:, 1:]) > 0.75
    with pytest.raises(ConfigError, match="without hidden states"):
        mlp.scores(dataclasses.replace(held, hidden=None), 1)


def test_a_routing_path_reads_more_than_the_running_token_s_id() -> None:
    """Routes follow the id of the token before: no table of ids can say them."""
    meaning = np.argsort(np.random.default_rng(8).random((6, 2, 12)), -1)[..., :3]

    def text(seed: int) -> Trace:
        ids = np.random.default_rng(seed).integers(0, 6, 600)
        routes = meaning[np.concatenate([ids[:1], ids[:-1]])]
        return trace_of(routes, [60] * 10, token_ids=ids.astype(np.int32))

    path, table = make("routing-path", SMALL["routing-path"]), make("token-table")
    for each in (path, table):
        each.fit(text(0), text(1))
    held = text(2)
    late = np.concatenate([np.arange(1, 60) + 60 * i for i in range(10)])
    ours, theirs = (
        recall(each.scores(held, "token")[late], held.experts[late]) for each in (path, table)
    )
    assert ours > 0.7 and theirs < 0.5, (ours, theirs)


def test_tokens_through_a_transformer_one_by_one_are_tokens_at_once() -> None:
    torch.manual_seed(0)
    net = Causal(16, 2, 2, window=5, dropout=0.0)
    x = torch.randn(1, 23, 16)
    with torch.no_grad():
        whole, _ = net(x, Past())
        past, parts = Past(), []
        for part in x.split([1, 1, 9, 1, 3, 7, 1], 1):
            out, past = net(part, past)
            parts.append(out)
        torch.testing.assert_close(torch.cat(parts, 1), whole, atol=1e-5, rtol=0)
        assert past.tokens == 23 and past.keys[0].shape[2] == 4
        # Two layers of a window of five reach eight tokens back, and no further.
        other = x.clone()
        other[:, :10] += 1
        reached = (net(other, Past())[0] - whole).abs().amax((0, 2)) > 1e-6
        assert reached.tolist() == [True] * 18 + [False] * 5


def test_two_hashes_tell_ids_apart() -> None:
    ids = torch.arange(50_000)
    first = hashed(ids, 0x9E3779B1, 0x7FEB352D, 16384)
    second = hashed(ids, 0x85EBCA77, 0x846CA68B, 16384)
    assert first.min() >= 0 and first.max() < 16384
    assert len(set(zip(first.tolist(), second.tolist(), strict=True))) > 49_900
    assert RoutingPath.settings_type().table_rows == 16384


def test_a_table_without_rows_is_the_table_of_the_others() -> None:
    rng = np.random.default_rng(0)
    ids, used = rng.integers(-1, 5, 60), (rng.random((60, 7)) < 0.3).astype(np.float32)
    without = _Table(ids, used).without(slice(10, 30))(np.arange(-1, 6))
    kept = np.r_[0:10, 30:60]
    for row, token in enumerate(range(-1, 6)):
        same = (ids[kept] == token) & (token >= 0)
        expected = (used[kept][same].sum(0) + 2 * used.mean(0)) / (same.sum() + 2)
        np.testing.assert_allclose(without[row], expected, rtol=1e-5)


@pytest.mark.parametrize("mode", ["A", "L"])
def test_a_prompt_encoder_sees_whose_turn_it_is(mode: str) -> None:
    """Prompts of a task take turns between two topics, which no average can tell."""
    topics = np.random.default_rng(3).dirichlet(np.full(12, 0.2), (2, 3))

    def text(seed: int, prompts: int) -> Trace:
        rng = np.random.default_rng(seed)
        rows = [
            [[rng.choice(12, p=topics[i % 2, layer]) for layer in range(3)] for _ in range(20)]
            for i in range(prompts)
        ]
        routes = np.concatenate(rows)[..., None]
        return trace_of(routes, [20] * prompts, tasks=("turns",) * prompts)

    encoder = make("prompt-encoder", {**SMALL["prompt-encoder"], "mode": mode})
    average = make("prompt-ema", {"period": 1, "mode": mode})
    held = text(2, 20)
    errors = []
    for each in (encoder, average):
        each.fit(text(0, 60), text(1, 12))
        likely = each.scores(held, "token")[100:]
        errors.append(np.abs(likely - topics[(np.arange(100, 400) // 20) % 2]).sum(-1).mean())
    assert errors[0] < 0.8 * errors[1], errors
    encoder.reset()
    encoder._prompt_ended("turns", np.ones((3, 12), np.int64))
    calls = encoder.model_calls
    np.testing.assert_allclose(encoder.predict("turns").sum(-1), 1, rtol=1e-5)
    assert encoder.model_calls - calls == (1 if mode == "A" else 3)


@pytest.mark.parametrize(
    ("name", "field", "value"),
    [
        ("forecaster", "hidden", 0),
        ("forecaster", "dropout", 1.0),
        ("forecaster", "fade", 0.0),
        ("forecaster", "recent_tokens", -1),
        ("forecaster", "learning_rate", 0.0),
        ("forecaster", "weight_decay", -1.0),
        ("layer-mlp", "max_layers", 0),
        ("layer-mlp", "fade", 1.5),
        ("layer-mlp", "recent_tokens", -1),
        ("routing-path", "width", 30),
        ("routing-path", "window", 0),
        ("prompt-encoder", "width", 30),
        ("prompt-encoder", "batches", 0),
    ],
)
def test_settings_that_cannot_work_are_refused(name: str, field: str, value: float) -> None:
    with pytest.raises(ConfigError, match=rf"^{field}: got {value!r}"):
        make(name, {field: value})


def test_a_memory_that_names_other_experts_is_refused() -> None:
    forecaster = make("forecaster", {"epochs": 1, "hidden": 4, "units": 2})
    forecaster.fit(random_trace(1))
    arrays = {**forecaster.state()}
    arrays["memory.routes"] = arrays["memory.routes"] + np.int16(8)
    with pytest.raises(CheckpointError, match=r"in memory\.routes"):
        forecaster.load_state(arrays)
    del arrays["out"]
    with pytest.raises(CheckpointError, match="no array 'out'"):
        forecaster.load_state(arrays)


def recall(scores: Any, experts: Any) -> float:
    top_k = experts.shape[-1]
    best = np.argsort(-scores, -1)[..., :top_k]
    return float((best[..., None] == experts[..., None, :]).any(-1).mean())
