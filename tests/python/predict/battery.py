"""Every predictor of sluice that works on small traces, fitted: what the battery runs over.

A new predictor is added to `FITTED` and gets every test of `test_battery.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from predict.small_traces import random_trace
from sluice.predict import BasePredictor, make
from sluice.predict.training_free.next_gate import NextGate
from sluice.predict.training_free.router_weights import RouterWeights

FIT = {"sequences": (40, 30, 35, 25), "seed": 1}

Case = tuple[str, Mapping[str, Any], Mapping[str, Any]]
"""Name, settings, and what its traces are like."""

CASES: dict[str, Case] = {
    "popularity": ("popularity", {}, {}),
    "popularity by task": ("popularity", {"by_task": True}, {}),
    "previous-token": ("previous-token", {}, {}),
    "decayed-frequency": ("decayed-frequency", {"half_life": 5.0}, {}),
    "token-table": ("token-table", {}, {}),
    "token-table adapting": ("token-table", {"adapt": True}, {}),
    "path-table by sets": ("path-table", {}, {}),
    "path-table by sets, few keys": ("path-table", {"max_keys": 20}, {}),
    "path-table by pairs": ("path-table", {"keys": "pairs"}, {}),
    "path-table by pairs adapting": ("path-table", {"keys": "pairs", "adapt": True}, {}),
    "path-table of one layer": ("path-table", {}, {"layers": 1}),
    "expert-map": ("expert-map", {"capacity": 50}, {}),
    "expert-map by states": ("expert-map", {"capacity": 50, "key": "states"}, {"hidden": 6}),
    "expert-map adapting": ("expert-map", {"capacity": 50, "adapt": True}, {}),
    "path-neighbours": ("path-neighbours", {"neighbours": 6}, {}),
    "path-neighbours adapting": (
        "path-neighbours",
        {"neighbours": 6, "adapt": True, "adapt_tokens": 5},
        {},
    ),
    "next-gate": ("next-gate", {"max_layers": 2}, {"hidden": 6}),
    "prompt-encoder": (
        "prompt-encoder",
        {"period": 1, "width": 8, "heads": 2, "layers": 1, "batches": 4},
        {},
    ),
    "prompt-encoder layer by layer": (
        "prompt-encoder",
        {"period": 2, "mode": "L", "width": 8, "heads": 2, "layers": 1, "batches": 4},
        {},
    ),
    "routing-path": (
        "routing-path",
        {"width": 16, "heads": 2, "layers": 2, "window": 5, "epochs": 2, "sequence_tokens": 16},
        {},
    ),
    "routing-path-t5": (
        "routing-path-t5",
        {
            **{"width": 8, "inner": 16, "layers": 2, "heads": 2, "head_width": 4},
            **{"table_rows": 64, "source_tokens": 4, "window": 6, "epochs": 2},
        },
        {},
    ),
    "layer-mlp": ("layer-mlp", {"epochs": 1, "hidden": 8, "units": 4, "recent_tokens": 9}, {}),
    "state-mlp": ("state-mlp", {"epochs": 1, "hidden": 8, "max_layers": 2}, {"hidden": 6}),
    "forecaster": ("forecaster", {"epochs": 1, "hidden": 8, "units": 4}, {}),
    "forecaster of short memory": (
        "forecaster",
        {"epochs": 1, "hidden": 8, "units": 4, "memory_tokens": 40, "recent_tokens": 7},
        {},
    ),
    "prompt-ema": ("prompt-ema", {"period": 1}, {}),
    "prompt-ema layer by layer": ("prompt-ema", {"period": 2, "mode": "L"}, {}),
    "prompt-ema when overlap falls": ("prompt-ema", {"period": "auto"}, {}),
}


GATED = {"next-gate"}
"""Made with gates that belong to no model: the battery asks for the rules, not for recall."""


def unfitted(case: str) -> tuple[Any, Callable[..., Any]]:
    """The predictor as it is made, and `random_trace` with the case's shape."""
    name, settings, like = CASES[case]
    predictor = make(name, settings)
    assert isinstance(predictor, BasePredictor)
    if name in GATED:
        gates = np.random.default_rng(0).normal(size=(4, 8, like["hidden"]))
        predictor = NextGate(predictor.settings, RouterWeights.plain(gates))

    def trace(seed: int, **more: Any) -> Any:
        return random_trace(seed, **{**like, **more})

    return predictor, trace


def fitted(case: str) -> tuple[Any, Callable[..., Any]]:
    """As `unfitted`, and fitted on four sequences."""
    predictor, trace = unfitted(case)
    predictor.fit(trace(**FIT))
    return predictor, trace
