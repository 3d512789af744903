"""How well a predictor foresees experts, on sequences that it has not read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sluice.errors import ConfigError
from sluice.predict.arrays import multi_hot
from sluice.predict.evaluation import metrics
from sluice.predict.evaluation.results import Bin, Depth, Evaluation, HorizonResult, Union
from sluice.predict.offline import Horizon, drive
from sluice.predict.protocol import Predictor, union_probability
from sluice.trace import Trace, check_disjoint

Array = NDArray[Any]

SET_SIZES = (1.0, 1.15, 1.25, 1.5, 1.75, 2.0)
BATCHES = (1, 4, 16)
_STEPS_AT_ONCE = 256


def evaluate(
    predictor: Predictor,
    trace: Trace,
    *,
    horizons: Sequence[Horizon] = ("token", 1),
    depths: Sequence[int] | None = None,
    batches: Sequence[int] = BATCHES,
    set_sizes: Sequence[float] = SET_SIZES,
    first_layer: int = 0,
    phase: str = "all",
    resamples: int = 1000,
    seed: int = 0,
) -> Evaluation:
    """Scores a predictor on sequences that its fit has not read.

    Args:
        predictor: One of sluice's, or any object that speaks the protocol.
        trace: What to score on, each sequence with its content hash.
        horizons: "token", or layers ahead.
        depths: The n of recall@n; None: k, k + 1, k + 3 and 2 k.
        batches: Sizes for B_acc; those with more lanes than sequences are left out.
        set_sizes: Of the predicted set for B_acc, over the true set.
        first_layer: Layers before it are not scored (1: those that only the token before foresees).
        phase: "decode": only tokens that a sequence wrote are scored, its prompt is but its past.
        resamples: Of the bootstrap over sequences.
        seed: Of its draws.

    Raises:
        ConfigError: The predictor has read one of the sequences, or a setting is out of range.
    """
    _refuse_read(predictor, trace)
    if trace.num_tokens == 0 or not 0 <= first_layer < trace.num_layers:
        raise ConfigError(
            f"evaluate: got {trace.num_tokens} tokens and first_layer {first_layer}, expected "
            f"tokens and a layer of 0 to {trace.num_layers - 1}"
        )
    k = trace.top_k
    wanted = tuple(depths) if depths is not None else (k, k + 1, k + 3, 2 * k)
    ns = tuple(sorted({n for n in wanted if n <= trace.num_experts}))
    if not ns or ns[0] < 1:
        raise ConfigError(f"depths: got {wanted}, expected numbers of 1 to {trace.num_experts}")
    rows, sequences = _scored(trace, phase)
    if not rows.size:
        raise ConfigError(f"evaluate: got no token of phase {phase!r}, expected some to score")
    truth = multi_hot(trace.experts[rows, first_layer:], trace.num_experts) > 0
    results: list[HorizonResult] = []
    for horizon in horizons:
        scores = scores_of(predictor, trace, horizon)[rows, first_layer:]
        results.append(
            HorizonResult(
                horizon=horizon,
                first_layer=first_layer,
                **_token_figures(sequences, k, scores, truth, ns, resamples=resamples, seed=seed),
                unions=tuple(_unions(sequences, scores, truth, batches, tuple(set_sizes))),
            )
        )
    return Evaluation(
        predictor=predictor.name,
        source=trace.source,
        tokens=len(rows),
        sequences=len(sequences),
        top_k=k,
        num_experts=trace.num_experts,
        results=tuple(results),
    )


def scores_of(predictor: Predictor, trace: Trace, horizon: Horizon) -> Array:
    """`scores` of whatever predicts: its own where it has them, else the live protocol driven.

    Returns:
        float32 `[N, S, E]`.

    Raises:
        ConfigError: A predictor's own scores are of another shape, or no probabilities.
    """
    own: Any = getattr(predictor, "scores", None)
    scores = drive(predictor, trace, horizon) if own is None else np.asarray(own(trace, horizon))
    shape = (*trace.experts.shape[:2], trace.num_experts)
    if scores.shape != shape:
        raise ConfigError(
            f"{predictor.name}: got scores of shape {list(scores.shape)}, expected {list(shape)}"
        )
    if scores.size and not (scores.min() >= 0 and scores.max() <= 1):
        raise ConfigError(
            f"{predictor.name}: got scores of {scores.min()} to {scores.max()}, expected "
            "probabilities"
        )
    return scores


def _refuse_read(predictor: Any, trace: Trace) -> None:
    fitting = getattr(predictor, "fitting", None)
    check_disjoint(() if fitting is None else fitting.read, trace, reader=predictor.name)


@dataclass(frozen=True, slots=True)
class _Scored:
    """What is scored of a sequence: rows of the arrays of figures, and its task."""

    rows: slice
    task: str

    @property
    def length(self) -> int:
        return self.rows.stop - self.rows.start


def _scored(trace: Trace, phase: str) -> tuple[Array, list[_Scored]]:
    """Rows of the trace that are scored, int64 `[M]`, and whose each stretch of them is."""
    spans = [trace.phase_rows(i, phase) for i in range(len(trace.sequences))]
    found: list[_Scored] = []
    begin = 0
    for span, sequence in zip(spans, trace.sequences, strict=True):
        if span:
            found.append(_Scored(slice(begin, begin + len(span)), sequence.task))
            begin += len(span)
    return np.concatenate([np.arange(0), *map(np.asarray, spans)]).astype(np.int64), found


def _token_figures(
    sequences: list[_Scored],
    k: int,
    scores: Array,
    truth: Array,
    ns: tuple[int, ...],
    *,
    resamples: int,
    seed: int,
) -> dict[str, Any]:
    """Everything that one token at a time says."""
    layers, experts = truth.shape[1:]
    recalls, shares, flags, counts = [], [], [], []
    calibration = np.zeros((metrics.BINS, 3))
    for sequence in sequences:
        of, true = scores[sequence.rows].reshape(-1, experts), truth[sequence.rows]
        true = true.reshape(-1, experts)
        sizes = true.sum(-1)
        hits = metrics.hits_at(of, true, (*ns, *range(1, k + 1)))
        own = np.take_along_axis(hits[:, len(ns) :], np.maximum(sizes - 1, 0)[:, None], 1)[:, 0]
        hits, some = hits[:, : len(ns)], np.maximum(sizes, 1)[:, None]
        by_layer = (hits / some).reshape(-1, layers, len(ns))
        recalls.append(by_layer.sum(0))  # [layers, n]
        shares.append((hits / np.asarray(ns)).sum(0))
        flags.append([(own == sizes).sum(), (2 * own >= sizes).sum()])
        counts.append(sequence.length)
        calibration += metrics.calibration_counts(of, true)
    recall, tokens = np.stack(recalls), np.asarray(counts, np.float64)
    events = tokens * layers
    totals = recall.sum(1)  # [sequences, n]
    tasks = list(dict.fromkeys(s.task for s in sequences))
    owner = np.array([tasks.index(s.task) for s in sequences])
    low, high = metrics.bootstrap(totals, events, resamples=resamples, seed=seed)
    task_low, task_high = metrics.bootstrap(
        totals, events, resamples=resamples, seed=seed, groups=owner
    )
    found: list[Depth] = []
    for i, n in enumerate(ns):
        by_task = {
            task: float(totals[owner == t, i].sum() / events[owner == t].sum())
            for t, task in enumerate(tasks)
        }
        found.append(
            Depth(
                n=n,
                recall=float(totals[:, i].sum() / events.sum()),
                precision=float(np.stack(shares)[:, i].sum() / events.sum()),
                interval=(float(low[i]), float(high[i])),
                task_mean=float(np.mean([*by_task.values()])),
                task_interval=(float(task_low[i]), float(task_high[i])),
                by_task=by_task,
                by_layer=tuple((recall[:, :, i].sum(0) / tokens.sum()).tolist()),
            )
        )
    exact, half = np.sum(flags, axis=0) / events.sum()
    count, predicted, observed = calibration.T
    some = np.maximum(count, 1)
    return {
        "depths": tuple(found),
        "exact_set": float(exact),
        "at_least_half": float(half),
        "calibration": tuple(
            Bin(count=int(c), predicted=float(p), observed=float(o))
            for c, p, o in zip(count, predicted / some, observed / some, strict=True)
        ),
        "calibration_error": float(np.abs(predicted - observed).sum() / count.sum()),
    }


def _unions(
    sequences: list[_Scored],
    scores: Array,
    truth: Array,
    batches: Sequence[int],
    sizes: tuple[float, ...],
) -> list[Union]:
    """B_acc of every batch size that the trace has sequences for, by size of the set."""
    found: list[Union] = []
    experts = truth.shape[-1]
    for batch in batches:
        if batch > len(sequences):
            continue
        rows = _batch_rows(sequences, batch)  # [steps, batch]
        hits, sets, actual = [], [], []
        for start in range(0, len(rows), _STEPS_AT_ONCE):
            some = rows[start : start + _STEPS_AT_ONCE].T
            joined = union_probability(scores[some]).reshape(-1, experts)
            true: Array = np.any(truth[some], axis=0).reshape(-1, experts)
            hit, size = metrics.set_hits(joined, true, sizes)
            hits.append(hit)
            sets.append(size)
            actual.append(true.sum(-1))
        hit, size = np.concatenate(hits), np.maximum(np.concatenate(sets), 1)
        used = np.maximum(np.concatenate(actual), 1)
        recalls, precisions = (hit / used[:, None]).mean(0), (hit / size).mean(0)
        rows_of = zip(sizes, recalls.tolist(), precisions.tolist(), strict=True)
        everything = (None, 1.0, float((used / experts).mean()))
        found += [
            Union(
                batch=batch,
                set_size=multiple,
                b_acc=recall,
                precision=precision,
                true_experts=float(used.mean()),
            )
            for multiple, recall, precision in [*rows_of, everything]
        ]
    return found


def _batch_rows(sequences: list[_Scored], batch: int) -> Array:
    """Rows that run together, until a lane is empty: int64 `[steps, batch]`."""
    spans = [np.arange(s.rows.start, s.rows.stop) for s in sequences]
    dealt = metrics.lanes([len(span) for span in spans], batch)
    played = [np.concatenate([spans[i] for i in lane]) for lane in dealt]
    steps = min(len(lane) for lane in played)
    return np.stack([lane[:steps] for lane in played], axis=1)
