"""From traces to a saved predictor: split by sequence, fit, early stop, held-out evaluation."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sluice.errors import ConfigError
from sluice.predict.base import BasePredictor, Progress
from sluice.predict.card import save
from sluice.predict.evaluation import Evaluation, evaluate
from sluice.predict.offline import Horizon
from sluice.trace import Split, Trace

SPLIT = "split.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class Training:
    """A fitted predictor and what it reaches on what it has not read.

    Args:
        predictor: Fitted; its `fitting` says on what.
        evaluation: On the split's score sequences; None where it has none.
        split: Who was read, who was scored.
    """

    predictor: BasePredictor[Any]
    evaluation: Evaluation | None
    split: Split

    def save(self, folder: str | os.PathLike[str]) -> Path:
        """Writes predictor, card and, beside them, `split.json`."""
        figures = None if self.evaluation is None else self.evaluation.to_dict()
        place = save(self.predictor, folder, evaluation=figures)
        self.split.save(place / SPLIT)
        return place


def train(
    predictor: BasePredictor[Any],
    trace: Trace,
    split: Split,
    *,
    seed: int = 0,
    horizons: Sequence[Horizon] = ("token", 1),
    first_layer: int = 0,
    progress: Progress | None = None,
) -> Training:
    """Fits on a split's fit sequences, chooses on its choose sequences, scores on the others.

    Args:
        predictor: Of sluice's own; fitted here, from nothing.
        trace: Holds the sequences that the split names.
        split: Roles by content hash.
        seed: Of the fit and of the evaluation's resampling.
        horizons: To score at.
        first_layer: Layers before it are not scored.
        progress: Called as `progress(done, total)` during the fit.

    Raises:
        ConfigError: The split names no sequence to fit on that the trace has, or the trace lacks
            what the predictor reads.
    """
    fit, choose, score = (split.of(trace, role) for role in ("fit", "choose", "score"))
    if not fit.sequences:
        raise ConfigError(
            f"train: got a split of which the trace's {len(trace.sequences)} sequences hold none "
            "to fit on, expected at least one; give more sequences or larger shares"
        )
    predictor.fit(fit, choose if choose.sequences else None, seed=seed, progress=progress)
    evaluation = None
    if score.sequences:
        evaluation = evaluate(
            predictor, score, horizons=horizons, first_layer=first_layer, seed=seed
        )
    return Training(predictor=predictor, evaluation=evaluation, split=split)
