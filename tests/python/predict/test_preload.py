"""EdgeMoE's preloader on a fake clock: order, skip, stop, cap, and what a layer takes with it."""

from __future__ import annotations

import numpy as np
import pytest

from sluice.errors import ConfigError
from sluice.predict.preload import LayerOutcome, LayerPreloader

P = np.array([0.1, 0.4, 0.0, 0.3, 0.2], np.float32)


def run(
    wanted: list[int],
    *,
    residents: tuple[int, ...] = (),
    load_s: float = 1.0,
    router_s: float = 2.5,
    cap: int = 3,
    known: bool = True,
) -> tuple[LayerOutcome, list[int], float]:
    """One layer: preloads until the router answers at `router_s`, then reads what is missing.

    Returns:
        The outcome, the loads in order of their start, and when the last byte is there.
    """
    started: list[int] = []
    preloader = LayerPreloader(
        P,
        residents,
        load_s=load_s,
        router_at_s=router_s if known else None,
        cap=cap,
        start=started.append,
    )
    now, ends = 0.0, None
    while now < router_s:
        if preloader.step(now) is not None:
            ends = now + load_s
        if preloader.running is None or ends is None or ends > router_s:
            break
        now = ends
        preloader.load_ended()
    outcome = preloader.answer(wanted)
    free = router_s if preloader.running is None or ends is None else ends
    begun = bool(outcome.late) or preloader.running is not None
    done = (free if begun else router_s) + load_s * len(outcome.demands)
    return outcome, started, done


def test_loads_go_by_probability_and_skip_residents_and_the_impossible() -> None:
    _, started, _ = run([1], router_s=10)
    assert started == [1, 3, 4]
    _, started, _ = run([1], residents=(3,), router_s=10)
    assert started == [1, 4, 0]
    _, started, _ = run([1], residents=(0, 1, 3, 4), router_s=10)
    assert started == []  # expert 2 has probability 0


def test_at_most_cap_are_loaded() -> None:
    assert run([1], router_s=10, cap=1)[1] == [1]
    assert run([1], router_s=10, cap=0)[1] == []


def test_a_load_that_would_not_end_before_the_router_answers_is_not_started() -> None:
    assert run([1], router_s=2.5)[1] == [1, 3]
    assert run([1], router_s=2.0)[1] == [1, 3]
    assert run([1], router_s=0.9)[1] == []
    assert run([1], router_s=2.5, known=False)[1] == [1, 3, 4]


def test_nothing_starts_once_the_router_has_answered_and_hints_are_cancelled() -> None:
    preloader = LayerPreloader(P, (), load_s=1.0)
    assert preloader.step(0.0) == 1 and preloader.step(0.5) is None  # one at a time
    outcome = preloader.answer([1, 2])
    assert outcome.late == (1,) and outcome.demands == (2,)
    assert outcome.cancelled == (3, 4) and outcome.wasted == ()
    preloader.load_ended()
    assert preloader.step(1.0) is None


def test_outcomes_by_hand() -> None:
    outcome, _, _ = run([3, 0, 4], residents=(4,), router_s=2.5)
    assert outcome.hits == (3, 4) and outcome.preloaded == (1, 3)
    assert outcome.wasted == (1,) and outcome.demands == (0,) and outcome.late == ()


@pytest.mark.parametrize("router_s", [2.0, 2.5, 4.0])
def test_all_right_takes_the_longer_of_loading_and_computing(router_s: float) -> None:
    outcome, _, done = run([1, 3], router_s=router_s, cap=2)
    assert outcome.demands == () and outcome.wasted == ()
    assert done == max(2 * 1.0, router_s)


def test_all_wrong_takes_their_sum_and_at_most_the_load_that_had_begun() -> None:
    _, _, done = run([0, 2], router_s=2.5)
    assert done == 2.5 + 2 * 1.0
    _, _, done = run([0, 2], router_s=2.5, known=False)  # one load is under way: it is waited out
    assert done == 2.5 + 0.5 + 2 * 1.0


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(ConfigError, match="cap -1"):
        LayerPreloader(P, (), load_s=1.0, cap=-1)
    with pytest.raises(ConfigError, match="load_s -1"):
        LayerPreloader(P, (), load_s=-1)
