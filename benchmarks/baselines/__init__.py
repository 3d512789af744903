"""Arms of one comparison: same prompts, routes, threads and bytes; only the policy differs."""

from pathlib import Path
from typing import Any

from baselines.accelerate_v5 import AccelerateArm
from baselines.arm import Arm, Sample
from baselines.lru_demand import LruDemandArm
from baselines.resident import ResidentArm
from baselines.sluice_arm import SluiceArm

__all__ = ["Arm", "Sample", "SluiceArm", "make_arm"]


def make_arm(mode: str, checkpoint: Path, scenario: dict[str, Any], share: float) -> Arm:
    """The arm that a scenario calls `mode`, at `share` of the experts' slot bytes.

    `resident-eager`, `resident-grouped`, `resident-batched`; `accelerate-v5:cold` and `:warm`;
    `lru-demand`; `sluice`, `sluice:pack`, `sluice:warm` (buffered reads), `resident-sluice`.
    """
    name, _, variant = mode.partition(":")
    if name.startswith("resident-") and name != "resident-sluice":
        return ResidentArm(mode, checkpoint, scenario, name.removeprefix("resident-"))
    if name == "accelerate-v5":
        return AccelerateArm(mode, checkpoint, scenario, cold=variant == "cold")
    if name == "lru-demand":
        return LruDemandArm(mode, checkpoint, scenario, share)
    if name in {"sluice", "resident-sluice"}:
        share = 1.0 if name == "resident-sluice" else share
        return SluiceArm(mode, checkpoint, scenario, share, variant)
    raise ValueError(f"mode: got {mode!r}; see baselines/__init__.py")
