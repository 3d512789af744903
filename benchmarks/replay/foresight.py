"""Policies and predictors over recorded routes: how much of the way from LRU to Belady they go.

No clock and no model: replacement alone, event by event, through the product's caches. A predictor
is fitted on a split's first sequences, chooses on the next ones and is scored on the rest, once for
each seed, which also deals the sequences.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from fitted import unfitted
from foresight_keys import (
    FIRST_LAYER,
    WITHOUT,
    Place,
    UnionKey,
    at_horizon,
    precision_key,
    recall_key,
)
from harness import row
from reference_traces import recorded
from sluice import predict
from sluice.reference import reference_model
from sluice.simulate import (
    Contender,
    gap_closed,
    gather_scores,
    order_of,
    popular_experts,
    replay,
    routes_of,
    run_grid,
)
from sluice.simulate.replay import ReplayResult
from sluice.simulate.routes import Routes
from sluice.trace import Split, Trace, concatenate, leave_out, load, split_by_sequence

ROOT = Path(__file__).resolve().parents[1]
RESAMPLES = 1000


@dataclass(frozen=True)
class Stream:
    """One order of the scored sequences.

    Args:
        name: Of the stream, or of the one task in it.
        trace: Its sequences.
        routes: As caches see them.
        sequence: int64 `[M]`: which sequence an event is of.
        own: bool `[M]`: False for tokens that all sequences of a task begin with.
    """

    name: str
    trace: Trace
    routes: Routes
    sequence: np.ndarray
    own: np.ndarray


def run(scenario: dict[str, Any]) -> list[dict[str, Any]]:
    """Rows: gap closed and hits of every contender on every stream; recall of every predictor."""
    work = scenario["workload"]
    every = work.get("every", [1] * len(work["traces"]))
    inputs = [
        part_of(name, apart, work.get("sequences"))
        for name, apart in zip(work["traces"], every, strict=True)
    ]
    parts = [trace for _, trace in inputs]
    stored = concatenate(parts)
    found: dict[Place, list[dict[str, Any]]] = {}
    recalls: dict[str, list[dict[str, Any]]] = {}
    for without, seed, split in splits(parts, stored, work):
        fit, choose, score = (split.of(stored, role) for role in ("fit", "choose", "score"))
        predictors = {
            f"{name}{without}": fitted(name, settings, fit, choose, seed)
            for name, settings in scenario["predictors"].items()
            if name != "source"  # by which the smoke test's replace the scenario's
        }
        for name, predictor in predictors.items():
            recalls.setdefault(name, []).append(recall(predictor, score, work))
        for stream in streams(score, work):
            judged = {1: judge(stream, fit, predictors, work)} | {
                batch: judge_batch(stream, batch, fit, work)
                for batch in work["batches"]
                if batch > 1
            }
            for batch, contenders in judged.items():
                for name, figures in contenders.items():
                    found.setdefault(Place(stream.name, batch, name), []).append(figures)
    data = data_of([path for path, _ in inputs], stored, work)
    rows = [
        one(scenario, data, str(place), "gap_closed", figures)
        for place, figures in found.items()
        if any(each["value"] is not None for each in figures)
    ]
    return rows + [
        one(scenario, data, name, "recall_at_k", figures) for name, figures in recalls.items()
    ]


def part_of(name: str, every: int, most: int | None = None) -> tuple[Path, Trace]:
    """A file and what is read of it: one sequence of `every`, of each task the first `most`.

    Args:
        name: A file beside this folder, or "recorded:ROLE": of the reference model, with states,
            where no more than those sequences is recorded.
        every: 1: all.
        most: None: all.
    """
    if name.startswith("recorded:"):
        path = recorded(name.removeprefix("recorded:"), hidden=True, every=every)
        every = 1
    else:
        path = ROOT / name
    trace = load(path)
    kept: list[int] = []
    of_task: Counter[str] = Counter()
    for i in range(0, len(trace.sequences), every):
        task = trace.sequences[i].task
        of_task[task] += 1
        if most is None or of_task[task] <= most:
            kept.append(i)
    return path, trace if len(kept) == len(trace.sequences) else trace.select(kept)


def data_of(files: Sequence[Path], stored: Trace, work: dict[str, Any]) -> dict[str, Any]:
    """What a row says of the traces behind it."""
    split = "a task left out" if work.get("leave_out") else work.get("split", work.get("roles"))
    return {
        "traces": [path.name for path in files],
        "sha256": [hashlib.sha256(path.read_bytes()).hexdigest() for path in files],
        "split": split,
        "seeds": work["seeds"],
        "text": "the model's own" if stored.own_text else "teacher-forced",
    }


def splits(
    parts: list[Trace], stored: Trace, work: dict[str, Any]
) -> Iterator[tuple[str, int, Split]]:
    """By seed: sequences dealt, a file for each role, or each task alone scored on all others.

    The name says which task was left out, "" for none.
    """
    for seed in work["seeds"]:
        if work.get("leave_out"):
            for task in stored.tasks:
                yield f"{WITHOUT}{task}", seed, leave_out(stored, task, seed=seed)
        elif "roles" in work:
            contents = [tuple(dict.fromkeys(s.content for s in part)) for part in parts]
            yield "", seed, Split(**dict(zip(work["roles"], contents, strict=True)))
        else:
            yield "", seed, split_by_sequence(stored, tuple(work["split"]), seed=seed)


def fitted(name: str, settings: dict[str, Any], fit: Trace, choose: Trace, seed: int) -> Any:
    """A predictor that has read the split's first two roles."""
    kind = settings.get("kind", name)
    made = unfitted(kind, settings.get("settings"), fit.top_k, reference_model())
    made.fit(fit, choose if choose.sequences else None, seed=seed)
    return made


def recall(predictor: Any, score: Trace, work: dict[str, Any]) -> dict[str, Any]:
    """Recall and precision by horizon, n and layer; B_acc by batch and size of the predicted set;
    what the fit took."""
    result = predict.evaluate(
        predictor,
        score,
        horizons=work["horizons"],
        batches=work["batches"],
        first_layer=FIRST_LAYER,
        phase=work.get("phase", "all"),
    )
    figures: dict[str, Any] = {"fit_s": predictor.fitting.duration_s}
    for at in result.results:
        for depth in at.depths:
            key = partial(recall_key, at.horizon, depth.n)
            figures |= {
                key(): depth.task_mean,
                key("low"): depth.task_interval[0],
                key("high"): depth.task_interval[1],
                key("worst task"): min(depth.by_task.values()),
                precision_key(at.horizon, depth.n): depth.precision,
            }
            if depth.n == result.top_k:
                figures[key("by layer")] = depth.by_layer
        figures[at_horizon(at.horizon, "exact set")] = at.exact_set
        figures[at_horizon(at.horizon, "calibration error")] = at.calibration_error
        for union in at.unions:
            size = "all" if union.set_size is None else f"{union.set_size:g}"
            for figure in ("b_acc", "precision"):
                of_union = UnionKey(str(at.horizon), union.batch, size, figure)
                figures[str(of_union)] = getattr(union, figure)
    last = result.results[-1]
    return {"value": next(d.task_mean for d in last.depths if d.n == result.top_k), **figures}


def streams(score: Trace, work: dict[str, Any]) -> Iterator[Stream]:
    """The scored sequences in the orders that the scenario names; "tasks": each task alone."""
    orders: dict[str, list[int]] = {}
    for name in work["streams"]:
        if name == "tasks":
            for task in score.tasks:
                orders[task] = [i for i, s in enumerate(score.sequences) if s.task == task]
        else:
            orders[name] = order_of(score, name)
    shared = {task: shared_tokens(score.of_task(task)) for task in score.tasks}
    for name, order in orders.items():
        trace = score.select(order)
        routes = routes_of(trace, phase=work.get("phase", "all"))
        assert routes.rows is not None
        index = np.concatenate([np.full(s.length, i) for i, s in enumerate(trace)])
        own = np.concatenate([np.arange(s.length) >= shared[s.task] for s in trace])
        yield Stream(name, trace, routes, index[routes.rows], own[routes.rows])


def shared_tokens(trace: Trace) -> int:
    """Tokens that all sequences of a task begin with: an instruction, seen as equal routes."""
    if len(trace.sequences) < 2:
        return 0
    shortest = min(s.length for s in trace.sequences)
    first = np.stack(
        [np.sort(trace.experts[s.start : s.start + shortest, 0], axis=-1) for s in trace.sequences]
    )
    same = (first == first[:1]).all(axis=(0, 2))
    return int(np.argmin(same)) if not same.all() else shortest


def judge(
    stream: Stream, fit: Trace, predictors: dict[str, Any], work: dict[str, Any]
) -> dict[str, dict[str, Any]]:
    """Per contender: hits and gap closed by slots, mean and interval, without shared tokens."""
    slots = slots_of(stream.routes, work)
    contenders = policies(fit, work)
    for name, predictor in predictors.items():
        kept = predictor.keep_scores_of(stream.trace, slots)
        if kept is not None:
            scores = {
                count: gather_scores(stream.routes, each)
                for count, each in zip(slots, kept, strict=True)
            }
            contenders.append(Contender(name, "forecast:always", scores=scores))
    grid = run_grid(stream.routes, contenders, slots, unscored=0)
    forced = [replay(stream.routes, "belady", count, bypass=False, unscored=0) for count in slots]
    results = {**grid.rows, "belady-no-bypass": forced}
    requests = np.diff(stream.routes.begins)
    misses = {n: np.stack([requests - r.event_hits for r in rs]) for n, rs in results.items()}
    figures: dict[str, dict[str, Any]] = {}
    for name, replayed in results.items():
        of = (misses["lru"], misses[name], misses["belady"])
        own = closed(*(m[:, stream.own].sum(1) for m in of))
        low, high = interval(stream.sequence, of)
        figures[name] = {
            **by_slots(closed(*(m.sum(1) for m in of)), replayed, work),
            "low": low,
            "high": high,
            "without_shared_tokens": known_mean(own),
        }
    return figures


def judge_batch(
    stream: Stream, batch: int, fit: Trace, work: dict[str, Any]
) -> dict[str, dict[str, Any]]:
    """The same of policies alone while so many sequences run side by side, without intervals:
    keep-scores follow one sequence after the other."""
    routes = routes_of(stream.trace, batch=batch, phase=work.get("phase", "all"))
    grid = run_grid(routes, policies(fit, work), slots_of(routes, work), unscored=0)
    return {
        name: by_slots(np.array(grid.gap_closed(name)), replayed, work)
        for name, replayed in grid.rows.items()
    }


def slots_of(routes: Routes, work: dict[str, Any]) -> list[int]:
    """Of a layer, by the scenario's shares."""
    return [max(1, round(share * routes.num_experts)) for share in work["slots"]]


def policies(fit: Trace, work: dict[str, Any]) -> list[Contender]:
    """The scenario's; a static cache holds what the fit saw most."""
    popular = {"static": partial(popular_experts, fit)}
    return [Contender(name, name, preloaded=popular.get(name)) for name in work["policies"]]


def by_slots(
    gaps: np.ndarray, replayed: Sequence[ReplayResult], work: dict[str, Any]
) -> dict[str, float | None]:
    """The mean gap closed; gap and hits of each share of slots. None where there is no gap."""
    figures = {"value": known_mean(gaps)}
    for share, gap, result in zip(work["slots"], gaps, replayed, strict=True):
        figures |= {f"gap_{share:g}": known_mean(gap), f"hits_{share:g}": result.hit_ratio}
    return figures


closed = np.vectorize(gap_closed, otypes=[float])
"""Of the way from LRU's misses to Belady's; elementwise, nan where Belady saves none."""


def known_mean(shares: np.ndarray) -> float | None:
    """Without those that are nan; None if all are."""
    known = shares[~np.isnan(shares)]
    return float(known.mean()) if known.size else None


def interval(
    sequence: np.ndarray, misses: tuple[np.ndarray, ...]
) -> tuple[float | None, float | None]:
    """95 % of the mean over slots, resampling whole sequences; None without a gap in any draw."""
    count = int(sequence.max()) + 1
    sums = [np.stack([np.bincount(sequence, row, count) for row in each]) for each in misses]
    drawn = np.random.default_rng(0).integers(0, count, (RESAMPLES, count))
    gaps = closed(*(each[:, drawn].sum(-1) for each in sums))
    means = np.nanmean(gaps[:, ~np.isnan(gaps).all(0)], axis=0)
    if not means.size:
        return None, None
    low, high = np.quantile(means, [0.025, 0.975])
    return float(low), float(high)


def one(
    scenario: dict[str, Any],
    data: dict[str, Any],
    mode: str,
    metric: str,
    figures: list[dict[str, Any]],
) -> dict[str, Any]:
    """A row of one figure by seed; what belongs to it, its mean over seeds, is derived.

    A seed without a figure, None, is left out of both; without any the derived figure is None.
    """
    known = {
        key: [figure[key] for figure in figures if figure[key] is not None] for key in figures[0]
    }
    return row(
        scenario,
        mode=mode,
        metric=metric,
        unit="share",
        better="higher",
        state="replay",
        samples=known.pop("value"),
        stop="max",
        correct="counters",
        config={"workload": scenario["workload"], "predictors": scenario["predictors"]},
        data=data,
        derived={
            key: np.round(np.mean(values, axis=0), 5).tolist() if values else None
            for key, values in known.items()
        },
    )
