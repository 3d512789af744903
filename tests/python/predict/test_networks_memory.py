"""What the forecaster and the MLPs remember: usage, futures, and tokens that are alike."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from predict.small_traces import random_trace
from sluice.predict.arrays import multi_hot
from sluice.predict.networks import neighbours
from sluice.predict.networks.futures import DISCOUNTS, WINDOW, discounted, next_uses_within, recall
from sluice.predict.networks.misses import misses
from sluice.predict.networks.neighbours import Likeness, Stretch, visible_rows
from sluice.predict.networks.usage import HALF_LIVES, NEVER, Usage, advance


def test_usage_is_what_a_loop_counts() -> None:
    trace = random_trace(3, sequences=(40, 37), layers=2, experts=5)
    used = torch.from_numpy(multi_hot(trace.experts, 5))
    weights = used * 0.25
    starts = np.zeros(77, bool)
    starts[[0, 40]] = True
    found, after = advance(Usage.nothing(2, 5), used, weights, torch.from_numpy(starts))
    counts = np.zeros((len(HALF_LIVES), 2, 5))
    fade = 2.0 ** (-1 / np.asarray(HALF_LIVES))
    age = np.full((2, 5), float(NEVER))
    own, tokens = np.zeros((2, 5)), 0
    for token, now in enumerate(used.numpy()):
        if starts[token]:
            own, tokens = np.zeros((2, 5)), 0
        counts = counts * fade[:, None, None] + now
        age = np.where(now > 0, 0, np.minimum(age + 1, NEVER))
        own, tokens = own + now, tokens + 1
        row = found[token].numpy()
        np.testing.assert_allclose(row[..., 0], np.log1p(age) / 4 - 0.8, atol=1e-5)
        np.testing.assert_allclose(row[..., 1], now)
        np.testing.assert_allclose(row[..., 2], now)
        np.testing.assert_allclose(row[..., 3], np.sqrt((own + 0.3) / (tokens + 3)), atol=1e-5)
        shares = np.sqrt(counts * (1 - fade)[:, None, None])
        np.testing.assert_allclose(row[..., 4:], shares.transpose(1, 2, 0), atol=1e-4)
    assert after.tokens == 37
    np.testing.assert_allclose(after.age.numpy(), age)


def test_next_uses_stop_at_the_window_and_at_the_sequence() -> None:
    routes = np.array([0, 1, 0, 1, 2, 0], np.int16).reshape(6, 1, 1)
    rows = Stretch(routes, np.array([0, 0, 0, 0, 1, 1]), 3)
    expected = [[2, 1, 0], [1, 2, 0], [0, 1, 0], [0, 0, 0], [1, 0, 0], [0, 0, 0]]
    assert next_uses_within(rows)[:, 0].tolist() == expected
    far = np.zeros((WINDOW + 2, 1, 1), np.int16)
    far[1:-1] = 1
    alone = next_uses_within(Stretch(far, np.zeros(len(far), np.int64), 2))
    assert alone[0, 0].tolist() == [0, 1], "token 0 is used again one token past the window"
    assert alone[1, 0, 0] == WINDOW


def test_a_future_is_worth_its_discount() -> None:
    worth = discounted(np.array([0, 1, 3], np.uint8))
    np.testing.assert_allclose(worth[0], 0)
    np.testing.assert_allclose(worth[1], 1)
    np.testing.assert_allclose(worth[2], np.square(DISCOUNTS), rtol=1e-6)


def test_rows_become_visible_when_their_future_is_over() -> None:
    low, high = visible_rows(np.array([0, 0, 0, 0, 3, 3]), recent=3, wait=2)
    assert high.tolist() == [0, 0, 0, 1, 4, 4]
    assert low.tolist() == [0, 0, 0, 0, 1, 1]


def test_what_was_seen_before_is_recalled() -> None:
    """A text that is in the memory: its own continuation is what follows, nearly alone."""
    text = random_trace(5, sequences=(30,), layers=3, experts=16, top_k=4, vocabulary=30)
    memory = random_trace(6, sequences=(200,), layers=3, experts=16, top_k=4, vocabulary=30)
    both = Stretch(np.concatenate([text.experts, memory.experts]), np.repeat([0, 1], [30, 200]), 16)
    sharp = Likeness(running=60.0, previous=30.0)
    (_, followed, sure), *_ = recall(Stretch.of(text), both, sharp, recent=0)
    truth = discounted(next_uses_within(Stretch.of(text)))
    assert np.abs(followed.numpy()[2:] - truth[2:]).mean() < 0.02
    assert sure[2:, -1, 0].min() > 0.99, "layers and the token before agree throughout"


def test_large_streams_are_recalled_alike_in_less_precise_products(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    text, memory = random_trace(7, sequences=(30, 20)), random_trace(8, sequences=(60, 50))
    arguments = (Stretch.of(text), Stretch.of(memory), Likeness())
    exact = torch.cat([f for _, f, _ in recall(*arguments, recent=20)])
    monkeypatch.setattr(neighbours, "_LARGE", 1)
    monkeypatch.setattr(neighbours, "_BLOCK", 7)
    rough = torch.cat([f for _, f, _ in recall(*arguments, recent=20)])
    assert 0 < (exact - rough).abs().max() < 0.01


def test_leaving_out_hides_the_rest_of_a_sequence_and_nothing_else() -> None:
    """The same figures as with a memory of the other sequences and one's own finished rows."""
    trace = random_trace(9, sequences=(40, 25, 30))
    whole = Stretch.of(trace)
    left_out = torch.cat(
        [f for _, f, _ in recall(whole, whole, Likeness(), recent=0, leave_out=True)]
    )
    for number, sequence in enumerate(trace.sequences):
        others = Stretch.of(trace.select(i for i in range(3) if i != number))
        alone = Stretch.of(trace.select([number]))
        blocks = recall(alone, others, Likeness(), recent=1000)
        expected = torch.cat([f for _, f, _ in blocks])
        # Futures of rows that are visible are over in both: only what is summed differs in order.
        torch.testing.assert_close(left_out[sequence.rows], expected, atol=1e-5, rtol=0)


def test_misses_are_counted_event_by_event() -> None:
    """Worked by hand: two slots, three experts, two of them a token."""
    experts = np.array([[[0, 1]], [[1, 2]], [[0, 1]]], np.int16)
    keep_1_and_2 = np.array([0.0, 1.0, 2.0])
    keep_0_and_1 = np.array([2.0, 1.0, 0.0])
    scores = np.stack([keep_1_and_2, keep_0_and_1], -1)[None, None].repeat(3, 0)
    # First: misses 0, 1; then 2, and 1 and 2 stay; then 0. Second: 0, 1, then 2, not kept.
    assert misses(experts, scores, 2).tolist() == [4, 3]
    assert misses(experts, scores, 3).tolist() == [3, 3]


def test_misses_are_those_of_a_plain_replay() -> None:
    trace = random_trace(4, sequences=(60,))
    scores = np.random.default_rng(0).random((60, 4, 8, 2))
    for capacity in (1, 2, 5):
        expected = [0, 0]
        for ranking in range(2):
            for layer in range(4):
                cached: set[int] = set()
                for token in range(60):
                    event = set(trace.experts[token, layer].tolist())
                    expected[ranking] += len(event - cached)
                    rank = scores[token, layer, :, ranking]
                    cached = set(sorted(cached | event, key=lambda e: -rank[e])[:capacity])
        assert misses(trace.experts, scores, capacity).tolist() == expected
