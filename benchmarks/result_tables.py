"""What published tables are made of: the newest run of a scenario, its caption, Markdown, marks."""

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from compare import load_rows
from harness import load_scenario

HERE = Path(__file__).resolve().parent

Row = dict[str, Any]
Cell = Callable[[Row], str]

NOTHING = "–"
MARKED = re.compile(r"(<!-- rows: ([\w-]+) -->\n).*?(<!-- /rows -->)", re.DOTALL)
FILES = {
    load_scenario(path)["name"]: path.name for path in sorted((HERE / "scenarios").glob("*.toml"))
}


def all_rows(results: Path) -> list[Row]:
    """Every committed row that is not retracted."""
    return [row for path in sorted(results.rglob("*.jsonl")) for row in load_rows(path)]


def newest_run(scenario: str, rows: Sequence[Row]) -> list[Row]:
    """The clean rows of a scenario's last run, one per mode and metric: of one machine and commit,
    so that what stands together in a table was measured together."""
    mine = [r for r in rows if r["scenario"] == scenario and not r["dirty"]]
    if not mine:
        return []
    last = max(mine, key=lambda r: r["time_utc"])
    run = [r for r in mine if (r["commit"], r["machine"]) == (last["commit"], last["machine"])]
    run.sort(key=lambda r: r["time_utc"])
    return list({(r["mode"], r["metric"]): r for r in run}.values())


def caption(title: str, *runs: Sequence[Row]) -> str:
    """A table's title, and of each run behind it the machine, the commit and the command."""
    return f"**{title}** ({'; '.join(_origin(run[0]) for run in runs if run)})"


def _origin(row: Row) -> str:
    return (
        f"{row['machine']['cpu']}, {row['threads']} threads, {row['machine']['ram_gib']:g} GiB; "
        f"commit {row['commit']}; `sluice bench benchmarks/scenarios/{FILES[row['scenario']]}`"
    )


def table(lines: Sequence[Mapping[str, str]]) -> str:
    """Of lines that name their cells, without the columns that say nothing; "" without any."""
    names = dict.fromkeys(name for line in lines for name in line)
    cells = {name: [line.get(name, NOTHING) for line in lines] for name in names}
    cells = {name: column for name, column in cells.items() if set(column) - {NOTHING}}
    if not cells:
        return ""
    body = [[*cells], ["---"] * len(cells), *zip(*cells.values(), strict=True)]
    return "\n".join("| " + " | ".join(line) + " |" for line in body)


def table_of(columns: Mapping[str, Cell], rows: Sequence[Row]) -> str:
    """A line a row, by what each column says of it."""
    return table([{name: cell(row) for name, cell in columns.items()} for row in rows])


def fill(document: str, bodies: Mapping[str, str]) -> str:
    """The document with everything between its marks replaced by the bodies of their names."""
    return MARKED.sub(lambda mark: f"{mark[1]}{bodies[mark[2]]}{mark[3]}", document)
