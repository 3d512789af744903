"""Predictors that lie, against none: they may cost next to nothing."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from sluice.simulate import (
    Guesses,
    Machine,
    Routes,
    next_use_scores,
    oracle_guesses,
    routes_of,
    run_timed,
)
from sluice.simulate.timed import TimedResult
from sluice.trace import load

DATA = Path(__file__).parents[3] / "benchmarks" / "data"
EXPERT_BYTES = 17_301_504  # of DeepSeek-V2-Lite in bf16
SLOTS = 26 * 16
WINDOW, FIRST = 4096, 1024  # events
MACHINES = {
    name: Machine(
        bytes_per_second=rate, seconds_per_chunk=1e-5, dense_seconds=2e-4, expert_seconds=2e-4
    )
    for name, rate in (("disk", 5e8), ("link", 2e10))
}

ROUTES = routes_of(load(DATA / "deepseek_v2_lite_translation.trace.safetensors").select([21, 22]))
TRUTH = next_use_scores(ROUTES)


def guesses_for_next(experts: np.ndarray) -> Guesses:
    """`[M, n]` experts that each event guesses for the next one."""
    count, each = experts.shape
    ahead = np.minimum(np.arange(count) + 1, count - 1)
    return Guesses(
        begins=np.arange(count + 1, dtype=np.int64) * each,
        layers=np.repeat(ROUTES.layers[ahead], each).astype(np.int32),
        experts=experts.reshape(-1).astype(np.int32),
        probabilities=np.ones(count * each, np.float32),
        steps_ahead=np.repeat(ROUTES.steps[ahead] - ROUTES.steps, each).astype(np.int32),
    )


def joined(first: Guesses, second: Guesses, event: int) -> Guesses:
    """`first` up to an event, then `second`."""
    a, b = int(first.begins[event]), int(second.begins[event])
    columns = {
        name: np.concatenate([getattr(first, name)[:a], getattr(second, name)[b:]])
        for name in ("layers", "experts", "probabilities", "steps_ahead")
    }
    begins = np.concatenate([first.begins[:event], second.begins[event:] - b + a])
    return Guesses(begins=begins, **columns)


def adversary(name: str, routes: Routes) -> tuple[Guesses, np.ndarray]:
    """What it guesses, and its keep-scores."""
    constant = np.tile(np.arange(58, 64), (routes.num_events, 1))
    if name == "constant lie":
        scores = np.tile(np.arange(64, dtype=np.float32), (routes.num_events, 1))
        return guesses_for_next(constant), scores
    # Of the next event's layer, who is used last: never one that it needs.
    ahead = np.minimum(np.arange(routes.num_events) + 1, routes.num_events - 1)
    known = TRUTH[ahead].copy()
    for event, target in enumerate(ahead):
        known[event, routes.experts[routes.begins[target] : routes.begins[target + 1]]] = np.inf
    latest = np.argsort(known, axis=1)[:, :6]
    flipped = guesses_for_next(latest)
    if name == "sign-flipped oracle":
        return flipped, -TRUTH
    half = routes.num_events // 2
    honest = oracle_guesses(routes, 1)
    if name == "honest":
        return honest, TRUTH
    return joined(honest, flipped, half), np.concatenate([TRUTH[:half], -TRUTH[half:]])


def run(machine: Machine, name: str | None) -> TimedResult:
    settings = {"expert_bytes": EXPERT_BYTES, "slots": SLOTS}
    if name is None:
        return run_timed(ROUTES, machine, policy="decayed-lfu", **settings)
    guesses, scores = adversary(name, ROUTES)
    return run_timed(ROUTES, machine, policy="forecast", guesses=guesses, scores=scores, **settings)


@pytest.mark.parametrize("machine", MACHINES)
def test_liars_cost_next_to_nothing(machine: str) -> None:
    alone = run(MACHINES[machine], None)
    assert ROUTES.num_events > FIRST + WINDOW + 1024
    for name in ("constant lie", "sign-flipped oracle", "honest, then lying"):
        misled = run(MACHINES[machine], name)
        assert alone.seconds / misled.seconds >= 0.98, name
        begins = np.arange(FIRST, ROUTES.num_events - WINDOW, 16)

        def read(result: TimedResult, begins: np.ndarray = begins) -> np.ndarray:
            sums = result.demand_bytes.astype(np.float64)
            return sums[begins + WINDOW] - sums[begins]

        worst = (read(misled) / read(alone)).max()
        assert worst <= 1.02, f"{name}: {worst:.3f} of the demand bytes in some window"
        wasted = float(misled.wasted_bytes[-1] - misled.wasted_bytes[FIRST])
        demand = float(misled.demand_bytes[-1] - misled.demand_bytes[FIRST])
        assert wasted / (wasted + demand) <= 0.05, name
        assert misled.stats.hints_distrusted > 0, name


def test_the_truth_is_believed() -> None:
    """Else the test above would hold for a cache that listens to nobody."""
    alone, told = (run(MACHINES["link"], name) for name in (None, "honest"))
    assert told.seconds < 0.8 * alone.seconds
    assert told.stats.bytes_read_demand < 0.6 * alone.stats.bytes_read_demand
