"""The tables of foresight.md: what predictors and policies reach over recorded routes.

Each function below takes the newest run of one scenario and returns its tables, or none where the
run has no such figures; `replay/foresight.py` makes the rows.
"""

import re
from collections.abc import Callable, Sequence
from statistics import fmean
from typing import NamedTuple

from result_tables import NOTHING, Cell, Row, caption, newest_run, table

TITLES = {
    "replay-dsv2lite": "Routes of DeepSeek-V2-Lite, three tasks, teacher-forced",
    "replay-reference": (
        "The reference model's own text, predictors fitted on text of training prompts"
    ),
    "recall-reference-states": "The reference model's own text, recorded with its states",
    "recall-dsv2lite-left-out": (
        "DeepSeek-V2-Lite, one layer ahead, in a task that the fit saw and in one that it did not"
    ),
}
REPLAYS = ("replay-dsv2lite", "replay-reference")
RECALLS = (*REPLAYS, "recall-reference-states")
IN_DOMAIN, LEFT_OUT = "replay-dsv2lite", "recall-dsv2lite-left-out"
FUTURE = ("belady", "belady-no-bypass")  # contenders that know it
FIRST_LAYER = 1  # layers before it are not scored
LAYERS_SHOWN = 7
HORIZONS = {
    "token": "A token ahead, before layer 0 runs",
    "1": "One layer ahead",
    "2": "Two layers ahead",
}
# Beside the best predictor in the tables of B_acc: the ones that papers compare with.
UNIONS_OF = ("previous-token", "token-table", "routing-path", "routing-path-t5")


def percent(share: float, digits: int = 1) -> str:
    return f"{100 * share:.{digits}f}"


def within(value: float, low: float, high: float) -> str:
    """A share and its 95 % interval, in percent."""
    return f"{percent(value)} [{percent(low)}, {percent(high)}]"


# Who should stay: rows of "gap_closed".


class Place(NamedTuple):
    """What a replay's row is of."""

    stream: str
    batch: int
    contender: str


def place(row: Row) -> Place:
    """From "STREAM: CONTENDER" or "STREAM, batch B: CONTENDER"."""
    where, _, contender = row["mode"].partition(": ")
    stream, _, batch = where.partition(", batch ")
    return Place(stream, int(batch or 1), contender)


def replayed(run: Sequence[Row]) -> dict[Place, Row]:
    return {place(row): row for row in run if row["metric"] == "gap_closed"}


def shares_of(run: Sequence[Row]) -> list[str]:
    """The shares of a layer's experts that had slots, smallest first, as keys spell them."""
    keys = {key for row in replayed(run).values() for key in row["derived"]}
    return sorted((k.removeprefix("hits_") for k in keys if k.startswith("hits_")), key=float)


def slots_of(shares: Sequence[str]) -> str:
    """For a column's name: "12.5 / 25 / 50 %"."""
    return " / ".join(f"{100 * float(share):g}" for share in shares) + " %"


def by_slots(row: Row, figure: str, shares: Sequence[str]) -> str:
    return " / ".join(percent(row["derived"][f"{figure}_{share}"]) for share in shares)


def stay(run: Sequence[Row]) -> list[str]:
    """Hits and gap closed of every contender, one sequence at a time."""
    shares = shares_of(run)
    columns: dict[str, Cell] = {
        "stream": lambda r: place(r).stream,
        "contender": lambda r: f"`{place(r).contender}`",
        f"hits %, slots {slots_of(shares)}": lambda r: by_slots(r, "hits", shares),
        "gap closed %, by slots": lambda r: by_slots(r, "gap", shares),
        "mean [95 %]": lambda r: within(
            fmean(r["samples"]), r["derived"]["low"], r["derived"]["high"]
        ),
        "without shared tokens": lambda r: percent(r["derived"]["without_shared_tokens"]),
        "seeds": lambda r: str(r["n"]),
    }
    return [table(columns, [row for at, row in replayed(run).items() if at.batch == 1])]


def split(run: Sequence[Row]) -> list[str]:
    """What is left of the gap to the best causal contender: by admission, by choice of victim."""
    rows = replayed(run)
    lines: list[Row] = []
    for stream in dict.fromkeys(at.stream for at in rows):
        single = {at.contender: row["derived"] for at, row in rows.items() if at[:2] == (stream, 1)}
        causal = [name for name in single if name not in FUTURE]
        for share in shares_of(run):
            key = f"gap_{share}"
            best = max(causal, key=lambda name: single[name][key])
            closed, forced = single[best][key], single["belady-no-bypass"][key]
            left = 1 - closed
            lines.append(
                {
                    "stream": stream,
                    "slots": f"{100 * float(share):g} %",
                    "best causal contender": f"`{best}`",
                    "its gap closed %": percent(closed),
                    "forced Belady's %": percent(forced),
                    "admission %": percent((1 - forced) / left) if left else NOTHING,
                    "victim choice %": percent((forced - closed) / left) if left else NOTHING,
                }
            )
    return [as_table(lines)]


def grids(run: Sequence[Row]) -> list[str]:
    """Hits of the policies at every batch size, side by side."""
    rows, shares = replayed(run), shares_of(run)
    batches = sorted({at.batch for at in rows})
    names = dict.fromkeys((at.stream, at.contender) for at in rows if at.batch > 1)
    lines = [
        {"stream": stream, "policy": f"`{name}`"}
        | {
            f"batch {batch}": by_slots(rows[Place(stream, batch, name)], "hits", shares)
            for batch in batches
        }
        for stream, name in names
    ]
    return [f"Hits %, slots {slots_of(shares)}:", as_table(lines)] if lines else []


def as_table(lines: Sequence[Row]) -> str:
    """Of lines that name their own cells, the same in each."""
    names = lines[0] if lines else ()
    return table({name: lambda line, name=name: line[name] for name in names}, lines)


# Who comes next: rows of "recall_at_k".


def recalls(run: Sequence[Row]) -> list[Row]:
    return [row for row in run if row["metric"] == "recall_at_k"]


def depths(row: Row, horizon: str) -> list[int]:
    """The n of recall@n at a horizon; the first is K."""
    found = (re.fullmatch(rf"{horizon}: recall@(\d+)", key) for key in row["derived"])
    return sorted(int(each[1]) for each in found if each)


def of_horizons(run: Sequence[Row], tables: Callable[[list[Row], str], str]) -> list[str]:
    """A labelled table of each horizon that the run's predictors were asked for."""
    rows = recalls(run)
    asked = [horizon for horizon in HORIZONS if rows and depths(rows[0], horizon)]
    return [part for each in asked for part in (f"{HORIZONS[each]}:", tables(rows, each))]


def recall_interval(row: Row, name: str) -> str:
    figures = row["derived"]
    return within(figures[name], figures[f"{name} low"], figures[f"{name} high"])


def come_next(run: Sequence[Row]) -> list[str]:
    """Recall beside precision at every depth, exact sets, calibration."""

    def one(rows: list[Row], horizon: str) -> str:
        k, *deeper = depths(rows[0], horizon)
        name = f"{horizon}: recall@{k}"

        def figure(key: str, digits: int = 1) -> Cell:
            return lambda r: percent(r["derived"][f"{horizon}: {key}"], digits)

        def pair(n: int) -> Cell:
            recall, precision = figure(f"recall@{n}"), figure(f"precision@{n}")
            return lambda r: f"{recall(r)} / {precision(r)}"

        columns: dict[str, Cell] = {
            "predictor": lambda r: f"`{r['mode']}`",
            f"recall@{k} % [95 %]": lambda r: recall_interval(r, name),
            "worst task": figure(f"recall@{k} worst task"),
            f"precision@{k}": figure(f"precision@{k}"),
            **{f"@{n}: recall / precision": pair(n) for n in deeper},
            "exact set %": figure("exact set"),
            "calibration error %": figure("calibration error", 2),
            "seeds": lambda r: str(r["n"]),
        }
        return table(columns, rows)

    return of_horizons(run, one)


def layers(run: Sequence[Row]) -> list[str]:
    """Recall@K by layer: of many, some at even distances."""

    def one(rows: list[Row], horizon: str) -> str:
        key = f"{horizon}: recall@{depths(rows[0], horizon)[0]} by layer"
        count = len(rows[0]["derived"][key])
        shown = range(0, count, -(-count // LAYERS_SHOWN))
        columns: dict[str, Cell] = {
            "predictor": lambda r: f"`{r['mode']}`",
            **{
                f"layer {FIRST_LAYER + i}": lambda r, i=i: percent(r["derived"][key][i])
                for i in shown
            },
        }
        return table(columns, rows)

    return of_horizons(run, one)


UNION = re.compile(r"token: batch (\d+), (\S+) x the true set: b_acc")


def unions(run: Sequence[Row]) -> list[str]:
    """B_acc and precision before layer 0 runs, by batch and size of the predicted set."""
    rows = [row for row in recalls(run) if depths(row, "token")]
    if not rows:
        return []
    name = f"token: recall@{depths(rows[0], 'token')[0]}"
    best = max(rows, key=lambda r: r["derived"][name])
    lines: list[Row] = []
    for row in rows:
        if row is not best and row["mode"] not in UNIONS_OF:
            continue
        found = [each.groups() for each in map(UNION.fullmatch, row["derived"]) if each]
        for batch in sorted({batch for batch, _ in found}, key=int):
            line = {"predictor": f"`{row['mode']}`", "batch": batch}
            for size in (size for of, size in found if of == batch):
                at = f"token: batch {batch}, {size} x the true set"
                figures = (row["derived"][f"{at}: {each}"] for each in ("b_acc", "precision"))
                head = "all experts" if size == "all" else f"{float(size):.2f} x"
                line[head] = " / ".join(map(percent, figures))
            lines.append(line)
    return ["B_acc / precision %, by size of the predicted set over the true one:", as_table(lines)]


def fits(run: Sequence[Row]) -> list[str]:
    """How long fits took, mean over seeds."""
    columns: dict[str, Cell] = {
        "predictor": lambda r: f"`{r['mode']}`",
        "fit, s": lambda r: f"{r['derived']['fit_s']:.3g}",
        "seeds": lambda r: str(r["n"]),
    }
    return [table(columns, recalls(run))]


# Two runs beside each other.


def domains(inside: Sequence[Row], outside: Sequence[Row]) -> list[str]:
    """Recall@K one layer ahead where every task was fitted, and in each task left out of the fit;
    the difference is of the means over tasks."""
    known = {row["mode"]: row for row in recalls(inside)}
    apart: dict[str, dict[str, Row]] = {}
    for row in recalls(outside):
        predictor, _, task = row["mode"].partition(" without ")
        apart.setdefault(predictor, {})[task] = row
    lines: list[Row] = []
    for predictor, of_task in apart.items():
        name = f"1: recall@{depths(next(iter(of_task.values())), '1')[0]}"
        mean = sum(row["derived"][name] for row in of_task.values()) / len(of_task)
        fitted = known.get(predictor)
        lines.append(
            {
                "predictor": f"`{predictor}`",
                f"in domain: {name.partition(': ')[2]} % [95 %]": (
                    recall_interval(fitted, name) if fitted else NOTHING
                ),
                "worst task": (
                    percent(fitted["derived"][f"{name} worst task"]) if fitted else NOTHING
                ),
                "left out: mean": percent(mean),
                "lost, points": percent(fitted["derived"][name] - mean) if fitted else NOTHING,
                **{f"{task} left out": recall_interval(row, name) for task, row in of_task.items()},
            }
        )
    return [as_table(lines)]


SECTIONS: dict[str, tuple[Sequence[str], Callable[[Sequence[Row]], list[str]]]] = {
    "stay": (REPLAYS, stay),
    "split": (REPLAYS, split),
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
