"""What an evaluation found: figures as values, as JSON, as tables for people.

Definitions: recall@n = c_n / |T|, precision@n = c_n / n; exact set: c_k = |T|; at least half:
c_k ≥ |T| / 2. B_acc (ExpertFlow, 2410.17954) is the recall of a batch's union; it says nothing
without the size of the predicted set, so that size and the precision stand beside it.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from sluice.errors import ConfigError
from sluice.predict.offline import Horizon
from sluice.text import table


@dataclass(frozen=True, slots=True, kw_only=True)
class Depth:
    """The first n experts by score.

    Args:
        n: How many are looked at.
        recall: c_n / |T|, mean over tokens and layers.
        precision: c_n / n, likewise.
        interval: 95 % of recall, over resampled sequences.
        task_mean: Mean of the tasks' recalls.
        task_interval: 95 % of it, sequences resampled within tasks.
        by_task: Recall of each task.
        by_layer: Recall of each layer.
    """

    n: int
    recall: float
    precision: float
    interval: tuple[float, float]
    task_mean: float
    task_interval: tuple[float, float]
    by_task: dict[str, float]
    by_layer: tuple[float, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Bin:
    """A tenth of predicted probability: `count` predictions, their mean, the share come true."""

    count: int
    predicted: float
    observed: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Union:
    """B_acc of one batch size and one size of the predicted set.

    Args:
        batch: Tokens of different sequences side by side.
        set_size: Predicted over true experts; None: everything is predicted.
        b_acc: Share of the union's experts predicted, mean over layers and steps.
        precision: Share of the predicted that were used, likewise.
        true_experts: Mean size of the union.
    """

    batch: int
    set_size: float | None
    b_acc: float
    precision: float
    true_experts: float


@dataclass(frozen=True, slots=True, kw_only=True)
class HorizonResult:
    """What one horizon reaches; layers before `first_layer` are left out of every figure.

    Args:
        horizon: "token", or layers ahead.
        first_layer: The first layer that was scored.
        depths: Recall and precision at n.
        exact_set: Share of (token, layer) whose first |T| experts are T.
        at_least_half: Share whose first |T| hold at least half of T.
        calibration: Ten bins of probability.
        calibration_error: |predicted - observed|, mean over predictions.
        unions: B_acc.
    """

    horizon: Horizon
    first_layer: int
    depths: tuple[Depth, ...]
    exact_set: float
    at_least_half: float
    calibration: tuple[Bin, ...]
    calibration_error: float
    unions: tuple[Union, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """All horizons of one predictor on one trace.

    Args:
        predictor: Its name.
        source: Of the trace.
        tokens: Scored.
        sequences: Scored.
        top_k: K of the trace.
        num_experts: E.
        results: One per horizon.
    """

    predictor: str
    source: str
    tokens: int
    sequences: int
    top_k: int
    num_experts: int
    results: tuple[HorizonResult, ...]

    def of(self, horizon: Horizon) -> HorizonResult:
        """The result of one horizon.

        Raises:
            ConfigError: It was not asked for.
        """
        for result in self.results:
            if result.horizon == horizon:
                return result
        raise ConfigError(
            f"evaluation: got horizon {horizon!r}, expected one of "
            f"{[result.horizon for result in self.results]}"
        )

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        return dataclasses.asdict(self)

    def to_text(self) -> str:
        """Tables for people."""
        lines = [
            f"{self.predictor} on {self.source or 'a trace'}: {self.tokens} tokens of "
            f"{self.sequences} sequences, top {self.top_k} of {self.num_experts}"
        ]
        for result in self.results:
            lines += ["", *_text_of(result)]
        return "\n".join(lines)


def _text_of(result: HorizonResult) -> list[str]:
    ahead = (
        "before layer 0 runs"
        if result.horizon == "token"
        else f"{result.horizon} layer{'s' if result.horizon != 1 else ''} ahead"
    )
    tasks = [*result.depths[0].by_task]
    head = ["n", "recall", "95 %", "precision", "mean of tasks", *(task or "-" for task in tasks)]
    rows = [
        [
            str(depth.n),
            f"{depth.recall:.3f}",
            f"{depth.interval[0]:.3f}-{depth.interval[1]:.3f}",
            f"{depth.precision:.3f}",
            f"{depth.task_mean:.3f}",
            *(f"{depth.by_task[task]:.3f}" for task in tasks),
        ]
        for depth in result.depths
    ]
    first = f", layers {result.first_layer} on" if result.first_layer else ""
    lines = [
        f"{ahead}{first}: exact set {result.exact_set:.3f}, at least half "
        f"{result.at_least_half:.3f}, calibration error {result.calibration_error:.4f}",
        table(head, rows),
    ]
    if result.unions:
        lines += [
            "",
            "B_acc / precision by size of the predicted set over the true one",
            *_unions(result),
        ]
    return lines


def _unions(result: HorizonResult) -> list[str]:
    """A row a batch size, a column a size of the set."""
    sizes = list(dict.fromkeys(union.set_size for union in result.unions))
    batches = list(dict.fromkeys(union.batch for union in result.unions))
    by_place = {(union.batch, union.set_size): union for union in result.unions}
    head = ["batch", "true", *("everything" if s is None else f"{s:.2f}" for s in sizes)]
    rows = [
        [
            str(batch),
            f"{by_place[batch, sizes[0]].true_experts:.1f}",
            *(f"{by_place[batch, s].b_acc:.3f}/{by_place[batch, s].precision:.3f}" for s in sizes),
        ]
        for batch in batches
    ]
    return [table(head, rows)]
