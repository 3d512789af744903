"""Runs on the virtual clock that a person can work out, and bounds in their order."""

from __future__ import annotations

import numpy as np
import pytest

from sluice.errors import CapacityError, ConfigError
from sluice.simulate import (
    Guesses,
    Machine,
    Routes,
    next_use_scores,
    oracle_guesses,
    replay,
    routes_of,
    run_timed,
)
from sluice.trace import Trace, TraceSequence

# One expert takes 1 s on the link, in three chunks; a layer 0.25 s before and 0.5 s with an expert.
MACHINE = Machine(
    bytes_per_second=3000.0, depth=2, chunk_bytes=1000, dense_seconds=0.25, expert_seconds=0.5
)
EXPERT_BYTES = 3000


def routes_from(experts: list[list[list[int]]], num_experts: int) -> Routes:
    array = np.array(experts, dtype=np.int16)
    return routes_of(
        Trace(
            experts=array,
            num_experts=num_experts,
            sequences=(TraceSequence(0, len(experts)),),
        )
    )


def test_a_hit_takes_computing_alone_and_a_miss_waits_for_its_load() -> None:
    routes = routes_from([[[0], [1]], [[0], [1]], [[2], [1]]], 3)
    run = run_timed(routes, MACHINE, expert_bytes=EXPERT_BYTES, slots=3)
    assert run.step_seconds == pytest.approx([2 * 1.75, 2 * 0.75, 1.75 + 0.75])
    assert (run.stats.hits, run.stats.misses, run.stats.late) == (3, 3, 0)
    assert run.stats.bytes_read_demand == 3 * EXPERT_BYTES
    assert run.stats.stall_s == pytest.approx(3.0)
    assert run.tokens_per_second == pytest.approx(3 / 7.5)


def never_the_same(tokens: int) -> Routes:
    """Each layer asks for another expert each time: nothing is ever used twice soon."""
    return routes_from([[[t % 8], [(t + 4) % 8]] for t in range(tokens)], 8)


def test_true_guesses_hide_loading_behind_computing() -> None:
    routes = never_the_same(40)
    slow = Machine(bytes_per_second=3000.0, depth=2, chunk_bytes=1000, dense_seconds=1.0)
    none = run_timed(routes, slow, expert_bytes=EXPERT_BYTES, slots=4, policy="lru")
    told = run_timed(
        routes, slow, expert_bytes=EXPERT_BYTES, slots=4, policy="lru",
        guesses=oracle_guesses(routes, 1),
    )  # fmt: skip
    assert none.step_seconds[-1] == pytest.approx(2 * (1.0 + 1.0)), "the sum"
    assert told.step_seconds[-1] == pytest.approx(2 * 1.0), "the larger of the two"
    assert told.stats.misses <= 1
    assert told.stats.bytes_read_hint_wasted == 0


def test_a_guess_too_late_is_a_late_hit() -> None:
    routes = never_the_same(40)
    told = run_timed(
        routes, MACHINE, expert_bytes=EXPERT_BYTES, slots=4, policy="lru",
        guesses=oracle_guesses(routes, 1),
    )  # fmt: skip
    assert told.stats.late > told.stats.hits, "0.75 s of computing hide less than 1 s of loading"
    assert told.step_seconds[-1] == pytest.approx(2 * 1.0, rel=0.02), "the link is the limit"


def test_wrong_guesses_cost_no_more_than_a_chunk() -> None:
    routes = never_the_same(40)
    count = routes.num_events
    wrong = Guesses(
        begins=np.arange(count + 1, dtype=np.int64),
        layers=(1 - routes.layers).astype(np.int32),
        experts=((routes.experts + 2) % 8).astype(np.int32),
        probabilities=np.ones(count, np.float32),
        steps_ahead=routes.layers.astype(np.int32),
    )
    none = run_timed(routes, MACHINE, expert_bytes=EXPERT_BYTES, slots=4, policy="lru")
    misled = run_timed(
        routes, MACHINE, expert_bytes=EXPERT_BYTES, slots=4, policy="lru", guesses=wrong
    )
    chunk_s = 1 / 3
    assert np.all(misled.step_seconds <= none.step_seconds + 2 * chunk_s + 1e-6)
    assert misled.stats.hints_distrusted > 0
    assert misled.seconds > none.seconds, "lies cost something, or this test proves nothing"


def test_knowing_the_future_is_belady_here_as_in_the_replay() -> None:
    rng = np.random.default_rng(3)
    experts = [[list(rng.choice(8, 2, replace=False)) for _ in range(3)] for _ in range(300)]
    routes = routes_from(experts, 8)
    run = run_timed(
        routes, MACHINE, expert_bytes=EXPERT_BYTES, slots=9, policy="forecast:always",
        scores=next_use_scores(routes),
    )  # fmt: skip
    bound = replay(routes, "belady", 9, scope="pool", unscored=0)
    forced = replay(routes, "belady", 9, scope="pool", unscored=0, bypass=False)
    lru = run_timed(routes, MACHINE, expert_bytes=EXPERT_BYTES, slots=9, policy="lru")
    assert bound.hits.sum() >= run.stats.hits
    assert run.stats.hits == pytest.approx(forced.hits.sum(), rel=0.01)
    assert run.stats.hits > lru.stats.hits


@pytest.mark.parametrize("slots", [8, 16, 32])
def test_plec_that_knows_the_next_token_misses_less_than_lru(slots: int) -> None:
    """X9 of ExpertFlow (2410.17954 §3.4): late ones count as misses here."""
    rng = np.random.default_rng(1)
    experts = [[rng.permutation(16)[:2].tolist() for _ in range(4)]]
    for _ in range(120):  # half of the experts stay from token to token
        experts.append(
            [[each[0], int((each[0] + rng.integers(1, 16)) % 16)] for each in experts[-1]]
            if rng.random() < 0.7
            else [rng.permutation(16)[:2].tolist() for _ in range(4)]
        )
    routes = routes_from(experts, 16)
    layers = routes.num_layers
    rows = np.zeros((routes.num_events, 16), np.float32)
    for event in range(routes.num_events - layers):
        begin, end = routes.begins[event + layers : event + layers + 2]
        rows[event, routes.experts[begin:end]] = 1
    lru = run_timed(routes, MACHINE, expert_bytes=EXPERT_BYTES, slots=slots, policy="lru")
    plec = run_timed(
        routes, MACHINE, expert_bytes=EXPERT_BYTES, slots=slots, policy="plec",
        guesses=oracle_guesses(routes, layers), scores=rows,
    )  # fmt: skip
    assert plec.stats.misses + plec.stats.late <= lru.stats.misses
    assert plec.stats.misses < 0.9 * lru.stats.misses
    assert plec.seconds <= lru.seconds


def test_a_horizon_of_a_token_says_each_event_once() -> None:
    routes = routes_from([[[0, 1], [2, 3]], [[1, 2], [0, 3]], [[3, 0], [1, 0]]], 4)
    guesses = oracle_guesses(routes, routes.num_layers)
    assert guesses.begins.tolist() == [0, 2, 4, 6, 8, 8, 8]
    assert guesses.layers.tolist() == [0, 0, 1, 1, 0, 0, 1, 1]
    assert guesses.experts.tolist() == [1, 2, 0, 3, 3, 0, 1, 0]
    assert guesses.steps_ahead.tolist() == [1] * 8


def test_what_cannot_be_is_refused_by_name() -> None:
    routes = routes_from([[[0], [1]]], 2)

    def run(**changed: object) -> None:
        settings = {"expert_bytes": EXPERT_BYTES, "slots": 2, **changed}
        run_timed(routes, settings.pop("machine", MACHINE), **settings)  # type: ignore[arg-type]

    with pytest.raises(ConfigError, match=r"link of 0\.0+ bytes/s"):
        run(machine=Machine(bytes_per_second=0.0))
    with pytest.raises(ConfigError, match="expected at most 4096; raise chunk_bytes"):
        run(expert_bytes=1 << 40)
    with pytest.raises(ConfigError, match='got "belady", expected one of'):
        run(policy="belady")
    with pytest.raises(ConfigError, match="got 3 keep-scores, expected one row of 2"):
        run(scores=np.zeros(3, np.float32))
    with pytest.raises(CapacityError, match="0 bytes"):
        run(slots=0)
