"""Traces replayed through the product's own caches: what a policy or a prediction is worth."""

from sluice.simulate.grid import Contender, Grid, grid_text, run_grid
from sluice.simulate.guesses import Guesses, guesses_of, next_use_scores, oracle_guesses
from sluice.simulate.headroom import Headroom, headroom, headroom_text
from sluice.simulate.replay import (
    ReplayResult,
    gap_closed,
    gather_scores,
    policy_names,
    popular_experts,
    replay,
)
from sluice.simulate.routes import Routes, routes_of
from sluice.simulate.streams import order_of
from sluice.simulate.timed import Machine, TimedResult, run_timed

__all__ = [
    "Contender",
    "Grid",
    "Guesses",
    "Headroom",
    "Machine",
    "ReplayResult",
    "Routes",
    "TimedResult",
    "gap_closed",
    "gather_scores",
    "grid_text",
    "guesses_of",
    "headroom",
    "headroom_text",
    "next_use_scores",
    "oracle_guesses",
    "order_of",
    "policy_names",
    "popular_experts",
    "replay",
    "routes_of",
    "run_grid",
    "run_timed",
]
