"""The tables of foresight.md: what predictors and policies reach over recorded routes.

Each function below takes the newest run of one scenario and returns its tables, or none where the
run has no such figures; `replay/foresight.py` makes the rows.
"""

from collections.abc import Callable, Mapping, Sequence
from statistics import fmean

from foresight_keys import (
    FIRST_LAYER,
    WITHOUT,
    Place,
    UnionKey,
    at_horizon,
    precision_key,
    recall_depths,
    recall_key,
)
from result_tables import NOTHING, Cell, Row, caption, newest_run, table, table_of

TITLES = {
    "replay-dsv2lite": "Routes of DeepSeek-V2-Lite, three tasks, teacher-forced",
    "replay-reference": (
        "The reference model's own text, predictors fitted on a quarter of training prompts' text"
    ),
    "recall-reference": "The same text, predictors fitted on all text of training prompts",
    "recall-reference-states": (
        "The same text with its states, predictors fitted on all text of training prompts"
    ),
    "recall-dsv2lite-left-out": (
        "DeepSeek-V2-Lite, one layer ahead, in a task that the fit saw and in one that it did not"
    ),
}
REPLAYS = ("replay-dsv2lite", "replay-reference")
RECALLS = (*REPLAYS, "recall-reference", "recall-reference-states")
IN_DOMAIN, LEFT_OUT = "replay-dsv2lite", "recall-dsv2lite-left-out"
FUTURE = ("belady", "belady-no-bypass")  # contenders that know it
LAYERS_SHOWN = 7
HORIZONS = {
    "token": "A token ahead, before layer 0 runs",
    "1": "One layer ahead",
    "2": "Two layers ahead",
}
# Beside the best predictor in the tables of B_acc: the ones that papers compare with.
UNIONS_OF = ("previous-token", "token-table", "routing-path", "routing-path-t5")


def percent(share: float | None, digits: int = 1) -> str:
    return NOTHING if share is None else f"{100 * share:.{digits}f}"


def within(value: float, low: float | None, high: float | None) -> str:
    """A share and its 95 % interval, in percent."""
    return f"{percent(value)} [{percent(low)}, {percent(high)}]"


# Who should stay: rows of "gap_closed".


def replayed(run: Sequence[Row]) -> dict[Place, Row]:
    return {Place.parse(row["mode"]): row for row in run if row["metric"] == "gap_closed"}


def shares_of(run: Sequence[Row]) -> list[str]:
    """The shares of a layer's experts that had slots, smallest first, as keys spell them."""
    keys = {key for row in replayed(run).values() for key in row["derived"]}
    return sorted((k.removeprefix("hits_") for k in keys if k.startswith("hits_")), key=float)


def slots_heading(shares: Sequence[str]) -> str:
    """For a column's name: "12.5 / 25 / 50 %"."""
    return " / ".join(f"{100 * float(share):g}" for share in shares) + " %"


def cell_by_slots(row: Row, figure: str, shares: Sequence[str]) -> str:
    return " / ".join(percent(row["derived"][f"{figure}_{share}"]) for share in shares)


def stay(run: Sequence[Row]) -> list[str]:
    """Hits and gap closed of every contender, one sequence at a time."""
    shares = shares_of(run)
    columns: dict[str, Cell] = {
        "stream": lambda r: Place.parse(r["mode"]).stream,
        "contender": lambda r: f"`{Place.parse(r['mode']).contender}`",
        f"hits %, slots {slots_heading(shares)}": lambda r: cell_by_slots(r, "hits", shares),
        "gap closed %, by slots": lambda r: cell_by_slots(r, "gap", shares),
        "mean [95 %]": lambda r: within(
            fmean(r["samples"]), r["derived"]["low"], r["derived"]["high"]
        ),
        "without shared tokens": lambda r: percent(r["derived"]["without_shared_tokens"]),
        "seeds": lambda r: str(r["n"]),
    }
    return [table_of(columns, [row for at, row in replayed(run).items() if at.batch == 1])]


def admission(run: Sequence[Row]) -> list[str]:
    """What is left of the gap to the best causal contender: by admission, by choice of victim."""
    rows = replayed(run)
    lines: list[Mapping[str, str]] = []
    for stream in dict.fromkeys(at.stream for at in rows):
        single = {at.contender: row["derived"] for at, row in rows.items() if at[:2] == (stream, 1)}
        for share in shares_of(run):
            gaps = {name: derived[f"gap_{share}"] for name, derived in single.items()}
            line = {"stream": stream, "slots": f"{100 * float(share):g} %"}
            lines.append(line | admission_cells(gaps))
    return [table(lines)]


def admission_cells(gaps: Mapping[str, float | None]) -> dict[str, str]:
    """Of the gap that each contender closes; None: there is no gap at so many slots."""
    causal = {name: gap for name, gap in gaps.items() if name not in FUTURE and gap is not None}
    if not causal:
        return {}
    best, closed = max(causal.items(), key=lambda each: each[1])
    forced, left = gaps.get("belady-no-bypass"), 1 - closed
    known = forced is not None and left
    return {
        "best causal contender": f"`{best}`",
        "its gap closed %": percent(closed),
        "forced Belady's %": percent(forced),
        "admission %": percent((1 - forced) / left) if known else NOTHING,
        "victim choice %": percent((forced - closed) / left) if known else NOTHING,
    }


def grids(run: Sequence[Row]) -> list[str]:
    """Hits of the policies at every batch size, side by side."""
    rows, shares = replayed(run), shares_of(run)
    batches = sorted({at.batch for at in rows})
    names = dict.fromkeys((at.stream, at.contender) for at in rows if at.batch > 1)
    lines = [
        {"stream": stream, "policy": f"`{name}`"}
        | {
            f"batch {batch}": cell_by_slots(rows[at], "hits", shares)
            for batch in batches
            if (at := Place(stream, batch, name)) in rows
        }
        for stream, name in names
    ]
    return [f"Hits %, slots {slots_heading(shares)}:", table(lines)] if lines else []


# Who comes next: rows of "recall_at_k".


def recalls(run: Sequence[Row]) -> list[Row]:
    return [row for row in run if row["metric"] == "recall_at_k"]


def depths(row: Row, horizon: str) -> list[int]:
    return recall_depths(row["derived"], horizon)


def of_horizons(run: Sequence[Row], tables: Callable[[list[Row], str], str]) -> list[str]:
    """A labelled table of each horizon that the run's predictors were asked for."""
    rows = recalls(run)
    asked = [horizon for horizon in HORIZONS if rows and depths(rows[0], horizon)]
    return [part for each in asked for part in (f"{HORIZONS[each]}:", tables(rows, each))]


def recall_interval(row: Row, horizon: str, n: int) -> str:
    return within(*(row["derived"][recall_key(horizon, n, of)] for of in ("", "low", "high")))


def come_next(run: Sequence[Row]) -> list[str]:
    """Recall beside precision at every depth, exact sets, calibration."""

    def one(rows: list[Row], horizon: str) -> str:
        k, *deeper = depths(rows[0], horizon)

        def figure(key: str, digits: int = 1) -> Cell:
            return lambda r: percent(r["derived"][key], digits)

        def pair(n: int) -> Cell:
            recall, precision = figure(recall_key(horizon, n)), figure(precision_key(horizon, n))
            return lambda r: f"{recall(r)} / {precision(r)}"

        columns: dict[str, Cell] = {
            "predictor": lambda r: f"`{r['mode']}`",
            f"recall@{k} % [95 %]": lambda r: recall_interval(r, horizon, k),
            "worst task": figure(recall_key(horizon, k, "worst task")),
            f"precision@{k}": figure(precision_key(horizon, k)),
            **{f"@{n}: recall / precision": pair(n) for n in deeper},
            "exact set %": figure(at_horizon(horizon, "exact set")),
            "calibration error %": figure(at_horizon(horizon, "calibration error"), 2),
            "seeds": lambda r: str(r["n"]),
        }
        return table_of(columns, rows)

    return of_horizons(run, one)


def layers(run: Sequence[Row]) -> list[str]:
    """Recall@K by layer: of many, some at even distances."""

    def one(rows: list[Row], horizon: str) -> str:
        key = recall_key(horizon, depths(rows[0], horizon)[0], "by layer")
        count = len(rows[0]["derived"][key])
        shown = range(0, count, -(-count // LAYERS_SHOWN))
        columns: dict[str, Cell] = {
            "predictor": lambda r: f"`{r['mode']}`",
            **{
                f"layer {FIRST_LAYER + i}": lambda r, i=i: percent(r["derived"][key][i])
                for i in shown
            },
        }
        return table_of(columns, rows)

    return of_horizons(run, one)


def unions(run: Sequence[Row]) -> list[str]:
    """B_acc and precision before layer 0 runs, by batch and size of the predicted set."""
    rows = [row for row in recalls(run) if depths(row, "token")]
    if not rows:
        return []
    name = recall_key("token", depths(rows[0], "token")[0])
    best = max(rows, key=lambda r: r["derived"][name])
    lines: list[Mapping[str, str]] = []
    for row in rows:
        if row is not best and row["mode"] not in UNIONS_OF:
            continue
        parsed = [key for key in map(UnionKey.parse, row["derived"]) if key is not None]
        found = [key for key in parsed if (key.horizon, key.figure) == ("token", "b_acc")]
        for batch in sorted({key.batch for key in found}):
            line = {"predictor": f"`{row['mode']}`", "batch": str(batch)}
            for key in (each for each in found if each.batch == batch):
                both = (key, key._replace(figure="precision"))
                head = "all experts" if key.size == "all" else f"{float(key.size):.2f} x"
                line[head] = " / ".join(percent(row["derived"][str(each)]) for each in both)
            lines.append(line)
    return ["B_acc / precision %, by size of the predicted set over the true one:", table(lines)]


def fits(run: Sequence[Row]) -> list[str]:
    """How long fits took, mean over seeds."""
    columns: dict[str, Cell] = {
        "predictor": lambda r: f"`{r['mode']}`",
        "fit, s": lambda r: f"{r['derived']['fit_s']:.3g}",
        "seeds": lambda r: str(r["n"]),
    }
    return [table_of(columns, recalls(run))]


# Two runs beside each other.


def domains(inside: Sequence[Row], outside: Sequence[Row]) -> list[str]:
    """Recall@K one layer ahead where every task was fitted, and in each task left out of the fit;
    the difference is of the means over tasks."""
    known = {row["mode"]: row for row in recalls(inside)}
    apart: dict[str, dict[str, Row]] = {}
    for row in recalls(outside):
        predictor, _, task = row["mode"].partition(WITHOUT)
        apart.setdefault(predictor, {})[task] = row
    lines: list[Mapping[str, str]] = []
    for predictor, of_task in apart.items():
        k = depths(next(iter(of_task.values())), "1")[0]
        name = recall_key("1", k)
        mean = fmean(row["derived"][name] for row in of_task.values())
        fitted = known.get(predictor)
        line = {
            "predictor": f"`{predictor}`",
            f"in domain: recall@{k} % [95 %]": (
                recall_interval(fitted, "1", k) if fitted else NOTHING
            ),
            "worst task": (
                percent(fitted["derived"][recall_key("1", k, "worst task")]) if fitted else NOTHING
            ),
            "left out: mean": percent(mean),
            "lost, points": percent(fitted["derived"][name] - mean) if fitted else NOTHING,
        }
        line |= {f"{task} left out": recall_interval(row, "1", k) for task, row in of_task.items()}
        lines.append(line)
    return [table(lines)]


SECTIONS: dict[str, tuple[Sequence[str], Callable[[Sequence[Row]], list[str]]]] = {
    "stay": (REPLAYS, stay),
    "admission": (REPLAYS, admission),
    "grids": (REPLAYS, grids),
    "next": (RECALLS, come_next),
    "layers": (RECALLS, layers),
    "unions": (RECALLS, unions),
    "fits": (RECALLS, fits),
}


def block(title: str, runs: Sequence[Sequence[Row]], parts: Sequence[str]) -> str:
    """A caption and its tables; "" without tables."""
    return "\n\n".join([caption(title, *runs), *parts]) + "\n" if any(parts) else ""


def tables(rows: Sequence[Row]) -> dict[str, str]:
    """By section what stands in foresight.md between the marks of its name."""
    runs = {scenario: newest_run(scenario, rows) for scenario in TITLES}
    bodies: dict[str, str] = {}
    for section, (scenarios, parts) in SECTIONS.items():
        blocks = [block(TITLES[s], [runs[s]], parts(runs[s])) for s in scenarios if runs[s]]
        bodies[section] = "\n".join(filter(None, blocks))
    pair = [runs[IN_DOMAIN], runs[LEFT_OUT]]
    return bodies | {"domains": block(TITLES[LEFT_OUT], pair, domains(*pair))}
