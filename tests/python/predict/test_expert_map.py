"""The map store by hand: search, threshold, bound and replacement."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from predict.small_traces import random_trace
from sluice.errors import ConfigError
from sluice.predict import RoutingEvent, make
from sluice.predict.training_free.expert_map import chosen
from sluice.predict.training_free.map_store import MapStore, prefix_lengths, unit


def test_a_repeated_prompt_finds_its_own_maps() -> None:
    trace = random_trace(1, sequences=(30, 20))
    predictor: Any = make("expert-map")
    predictor.fit(trace)
    used = (trace.experts[..., None] == np.arange(8)).any(2)
    likeness_one = predictor.scores(trace, 1)[:, 3]  # found by three layers of its own path
    weights = np.zeros(used.shape, np.float32)
    np.put_along_axis(weights, trace.experts.astype(int), trace.weights, -1)
    own = np.minimum(2 * weights / weights.sum(-1, keepdims=True), 1)
    np.testing.assert_allclose(likeness_one, own[:, 3], atol=1e-3)
    # Before layer 0 a token is found by the token before it; the first has none.
    by_key = predictor.scores(trace, "token")
    np.testing.assert_allclose(by_key[1:30, 0], own[1:30, 0], atol=1e-3)
    np.testing.assert_allclose(by_key[0, 0], used[:, 0].mean(0), atol=1e-6)


def test_what_is_unlike_gets_the_rates_of_all_tokens() -> None:
    trace = random_trace(1, sequences=(30,), experts=8, top_k=1)
    predictor: Any = make("expert-map", {"capacity": 1})
    predictor.fit(trace.select([0]))
    store = predictor.state()["maps"]
    assert len(store) == 1
    routes = trace.experts.copy()
    routes[:, 0, 0] = (store[0, 0].argmax() + 1) % 8  # layer 0 never as in the stored map
    other = random_trace(2, sequences=(30,), experts=8, top_k=1)
    other.experts[:, 0] = routes[:, 0]
    rates = (trace.experts[..., None] == np.arange(8)).any(2).mean(0)
    np.testing.assert_allclose(
        predictor.scores(other, 1)[:, 1], np.tile(rates[1], (30, 1)), rtol=1e-5
    )


def test_what_stays_is_probable_and_visited() -> None:
    trace = random_trace(5, sequences=(12, 9), experts=8, top_k=2)
    predictor: Any = make("expert-map")
    predictor.fit(trace.select([0]))
    running = trace.select([1])
    kept = predictor.keep_scores(running)
    visits = np.zeros(kept.shape[1:], np.float32)
    for token, routes in enumerate(running.experts):
        for layer, experts in enumerate(routes[:-1]):
            assert (kept[token, layer][visits[layer] == 0] == 0).all()
            visits[layer, experts] += 1
        visits[-1, routes[-1]] += 1
        # Once the last layer has run, as the next token finds it: probability before layer 0.
        if token + 1 < running.num_tokens:
            probable = predictor.scores(running, "token")[token + 1, -1]
            np.testing.assert_allclose(kept[token, -1], probable * visits[-1], rtol=1e-5)
    assert (kept > 0).any()


def test_a_map_is_found_by_cosine_over_the_layers_so_far() -> None:
    maps = np.zeros((3, 2, 4), np.float32)
    maps[0, :, 0] = 1
    maps[1, :, 1] = 1
    maps[2] = [[0.5, 0.5, 0, 0], [0, 0, 0, 1]]
    store = MapStore(3, 0.5, maps, np.zeros((3, 2), np.float32))
    asked = np.array([[[0.6, 0.8, 0, 0], [0, 1, 0, 0]]], np.float32)
    lengths = prefix_lengths(asked)
    first = store.dots(asked[:, 0], 0)
    best, how = store.nearest_path(first, lengths[:, 1], 1)
    assert best.tolist() == [2] and how[0] == pytest.approx(1.4 * 0.5 / np.sqrt(0.5), abs=1e-5)
    both = first + store.dots(asked[:, 1], 1)
    best, how = store.nearest_path(both, lengths[:, 2], 2)
    assert best.tolist() == [1] and how[0] == pytest.approx(1.8 / np.sqrt(2 * 2), abs=1e-5)


def test_a_full_store_gives_up_the_map_most_like_the_new_one() -> None:
    eye = np.eye(4, dtype=np.float32)
    maps = eye[:, None]  # four maps of one layer
    keys = eye[[0, 1, 2, 3], :2]
    store = MapStore(3, 0.4, maps[:3], keys[:3])
    # .4 sem + .6 traj: like map 1 by its key (.4), like map 2 by its path (.6).
    store.insert(eye[None, None, 2], eye[None, 1, :2])
    assert len(store) == 3
    np.testing.assert_array_equal(store.maps[:, 0].argmax(-1), [0, 1, 2])
    np.testing.assert_array_equal(store.keys[2], [0, 1])
    # Now like map 1 by its key (.4) and map 2 by its key (.4) and nothing by its path: the older.
    store.insert(eye[None, None, 3], eye[None, 1, :2])
    np.testing.assert_array_equal(store.maps[:, 0].argmax(-1), [0, 3, 2])


def test_maps_of_one_block_are_weighed_against_each_other_as_one_by_one() -> None:
    rng = np.random.default_rng(0)
    maps = rng.random((200, 3, 5)).astype(np.float32)
    keys = unit(rng.normal(size=(200, 4)))
    at_once = MapStore(20, 0.3, maps[:0], keys[:0])
    one_by_one = MapStore(20, 0.3, maps[:0], keys[:0])
    at_once.insert(maps, keys)
    for row in range(200):
        one_by_one.insert(maps[row : row + 1], keys[row : row + 1])
    assert len(at_once) == 20
    np.testing.assert_array_equal(at_once.maps, one_by_one.maps)


@pytest.mark.parametrize(
    ("likeness", "top_k", "taken"),
    [(1.0, 1, [0]), (0.6, 1, [0]), (0.45, 1, [0, 2]), (0.0, 1, [0, 1, 2, 3]), (1.0, 3, [0, 2, 1])],
)
def test_experts_are_taken_until_they_sum_to_what_the_match_lacks(
    likeness: float, top_k: int, taken: list[int]
) -> None:
    probabilities = np.array([0.5, 0.15, 0.25, 0.1], np.float32)
    assert np.flatnonzero(chosen(probabilities, likeness, top_k)).tolist() == sorted(taken)


def play(predictor: Any, trace: Any, rows: range, layers: int | None = None) -> None:
    for row in rows:
        predictor.begin_step(row, np.array([0]), None, ("",))
        for layer in range(trace.num_layers if layers is None else layers):
            predictor.observe(
                RoutingEvent(
                    step=row,
                    layer=layer,
                    experts=trace.experts[row : row + 1, layer],
                    weights=trace.weights[row : row + 1, layer],
                    requests=np.array([0]),
                )
            )


def test_plans_hold_k_experts_of_a_perfect_match_nearest_first() -> None:
    trace = random_trace(1, sequences=(30,), layers=5)
    predictor: Any = make("expert-map")
    predictor.fit(trace)
    play(predictor, trace, range(9))
    play(predictor, trace, range(9, 10), layers=3)
    guesses = predictor.plan(2)
    wanted = {(layer, int(e)) for layer in (3, 4) for e in trace.experts[9, layer]}
    assert {(guess.layer, guess.expert) for guess in guesses} == wanted
    priorities = [guess.probability / (guess.layer - 2) for guess in guesses]
    assert priorities == sorted(priorities, reverse=True)


def test_what_has_left_is_found_again_when_it_adapts() -> None:
    fit, new = random_trace(1, sequences=(20,)), random_trace(9, sequences=(15, 15))
    twice = random_trace(9, sequences=(15, 15))
    twice.experts[15:], twice.weights[15:] = new.experts[:15], new.weights[:15]
    still: Any = make("expert-map")
    adapting: Any = make("expert-map", {"adapt": True})
    for predictor in (still, adapting):
        predictor.fit(fit)
    used = (twice.experts[..., None] == np.arange(8)).any(2)
    reached = {
        predictor: predictor.scores(twice, 1)[15:, 3][used[15:, 3]].mean()
        for predictor in (still, adapting)
    }
    assert reached[adapting] > reached[still] + 0.2
    assert len(adapting.state()["maps"]) == 20  # what was fitted is kept


def test_states_are_keys_where_they_are_asked_for() -> None:
    trace = random_trace(1, sequences=(12,), hidden=6)
    predictor: Any = make("expert-map", {"key": "states"})
    predictor.fit(trace)
    keys = predictor.state()["keys"]
    mean = trace.hidden[:5, 0].astype(np.float32).sum(0)
    np.testing.assert_allclose(keys[5], mean / np.linalg.norm(mean), rtol=1e-3)
    assert not keys[0].any()
    with pytest.raises(ConfigError, match="without hidden states"):
        predictor.scores(random_trace(2, sequences=(5,)), 1)


@pytest.mark.parametrize(
    "settings", [{"capacity": 0}, {"key": "embedding"}, {"distance": -1}], ids=str
)
def test_settings_that_cannot_work_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        make("expert-map", settings)
