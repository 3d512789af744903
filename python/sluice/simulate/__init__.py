"""Traces replayed through the product's own caches: what a policy or a prediction is worth."""

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

__all__ = [
    "ReplayResult",
    "Routes",
    "gap_closed",
    "gather_scores",
    "order_of",
    "policy_names",
    "popular_experts",
    "replay",
    "routes_of",
]
