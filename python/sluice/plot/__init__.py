"""Figures of what happened inside a generation, and the recorder that watches one.

matplotlib is imported by the first figure, never by `import sluice`.
"""

from sluice.plot.figures import (
    bytes_by_reason,
    generation_figure,
    hits_over_tokens,
    require_matplotlib,
    residency_map,
    timeline_figure,
)
from sluice.plot.recorder import Recorder, Recording, Step
from sluice.plot.simulations import headroom_figure, policy_grid

__all__ = [
    "Recorder",
    "Recording",
    "Step",
    "bytes_by_reason",
    "generation_figure",
    "headroom_figure",
    "hits_over_tokens",
    "policy_grid",
    "require_matplotlib",
    "residency_map",
    "timeline_figure",
]
