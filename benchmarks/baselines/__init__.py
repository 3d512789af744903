"""Arms of one comparison: same prompts, routes, threads and bytes; only the policy differs."""

from pathlib import Path
from typing import Any

from baselines.accelerate_v5 import AccelerateArm
from baselines.arm import Arm, Generation, Sample
from baselines.belady import BeladyArm
from baselines.foresight import ForesightArm
from baselines.lru_demand import LruDemandArm
from baselines.resident import ResidentArm
from baselines.sluice_arm import SluiceArm

__all__ = ["Arm", "Generation", "Sample", "SluiceArm", "is_swept", "make_arm"]

# Arms of the closed loop over one pack: who leaves, and for EdgeMoE's ladder whose guesses come.
OVERLAP = {"lru-overlap": "lru", "decayed-overlap": "decayed-lfu"}
EDGE_RUNGS = {"edgemoe-preload": "lru", "edgemoe": "edge"}


def is_swept(mode: str) -> bool:
    """Whether a mode runs at each of the scenario's budgets; others hold every expert."""
    return not mode.startswith(("resident-", "accelerate-"))


def make_arm(mode: str, checkpoint: Path, scenario: dict[str, Any], share: float) -> Arm:
    """The arm that a scenario calls `mode`, at `share` of the experts' slot bytes.

    `resident-eager`, `resident-grouped`, `resident-batched`; `accelerate-v5:cold` and `:warm`;
    `lru-demand`; `sluice`, `sluice:pack`, `sluice:warm` (buffered reads), `resident-sluice`; and
    of the closed loop `lru-overlap`, `decayed-overlap`, `foresight:KIND`,
    `foresight-discarded:KIND`, `resident-foresight:KIND` (all experts are there, so that only
    thinking costs), `edgemoe-preload`, `edgemoe`, `belady-victims`, `belady-victims+token`, where
    KIND is one of the scenario's `[predictors]`, or several with + between (default: forecaster).
    """
    name, _, variant = mode.partition(":")
    if name in {"resident-eager", "resident-grouped", "resident-batched"}:
        return ResidentArm(mode, checkpoint, scenario, name.removeprefix("resident-"))
    if name == "accelerate-v5":
        return AccelerateArm(mode, checkpoint, scenario, cold=variant == "cold")
    if name == "lru-demand":
        return LruDemandArm(mode, checkpoint, scenario, share)
    if name in {"sluice", "resident-sluice"}:
        share = 1.0 if name == "resident-sluice" else share
        return SluiceArm(mode, checkpoint, scenario, share, variant)
    if name in OVERLAP:
        return SluiceArm(mode, checkpoint, scenario, share, "pack", policy=OVERLAP[name])
    if name in EDGE_RUNGS:
        policy = EDGE_RUNGS[name]
        return ForesightArm(mode, checkpoint, scenario, share, kinds=["path-table"], policy=policy)
    if name in {"foresight", "foresight-discarded", "resident-foresight"}:
        kinds = (variant or "forecaster").split("+")
        discarded = name == "foresight-discarded"
        policy = "forecast" if name == "foresight" else "decayed-lfu"
        share = 1.0 if name == "resident-foresight" else share
        return ForesightArm(
            mode, checkpoint, scenario, share, kinds=kinds, policy=policy, discarded=discarded
        )
    if name in {"belady-victims", "belady-victims+token"}:
        return BeladyArm(mode, checkpoint, scenario, share, hints=name.endswith("+token"))
    raise ValueError(f"mode: got {mode!r}; see baselines/__init__.py")
