"""Prints the README's tables from committed, clean rows, between its `<!-- rows -->` marks."""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

from compare import load_rows  # noqa: E402
from harness import load_scenario  # noqa: E402

BEGIN, END = "<!-- rows -->", "<!-- /rows -->"
# Scenario -> what its table says, in the order of the README.
TITLES = {
    "dsv2lite-4-layer-cut-decode": (
        "Decode, DeepSeek-V2-Lite layer shapes (4-layer cut, recorded routes), bf16, batch 1"
    ),
    "dsv2lite-4-layer-cut-decode-warm": "The same with the files in the page cache (RAM)",
    "dsv2lite-4-layer-cut-prefill-128": "Prefill of 128 tokens, the same cut",
    "dsv2lite-4-layer-cut-prefill-512": "Prefill of 512 tokens, the same cut",
    "dsv2lite-4-layer-cut-module": "One experts module at these shapes, all resident",
    "qwen3-30b-a3b-4-layer-cut-decode": (
        "Decode, Qwen3-30B-A3B layer shapes (4-layer cut, sticky synthetic routes), bf16, batch 1"
    ),
    "reference-decode": "Decode, the shipped reference model (trained, own routes), bf16, batch 1",
    "closed-loop-reference": (
        "Foresight on the reference model's own text (prompts of its test split), bf16, batch 1"
    ),
    "closed-loop-reference-550": "Foresight, reference model (own text), disk held to 550 MB/s",
    "closed-loop-reference-50": "Foresight, reference model (own text), disk held to 50 MB/s",
    "closed-loop-dsv2lite-4-layer-cut": (
        "Foresight, DeepSeek-V2-Lite layer shapes (4-layer cut, recorded routes), bf16, batch 1"
    ),
    "closed-loop-dsv2lite-4-layer-cut-550": "The same from a disk held to 550 MB/s",
    "closed-loop-dsv2lite-4-layer-cut-50": "The same from a disk held to 50 MB/s",
    "edgemoe-ladder-reference-550": (
        "EdgeMoE's ladder without its low-bit rung, the reference model's own text, a disk held to "
        "550 MB/s"
    ),
    "edgemoe-ladder-reference-50": "The same from a disk held to 50 MB/s",
    "foresight-cost-reference": (
        "Predictors whose plans move nothing, the reference model's own text, bf16, batch 1"
    ),
    "foresight-cost-dsv2lite-4-layer-cut": (
        "Predictors whose plans move nothing, DeepSeek-V2-Lite layer shapes (4-layer cut)"
    ),
    "kernel-dsv2lite": "Few-token kernel, H 2048, I 1408, bf16, beyond the last-level cache",
    "kernel-qwen3-30b": "Few-token kernel, H 2048, I 768, bf16, beyond the last-level cache",
    "qwen3-30b-a3b-16-layer-cut-gpu": (
        "MoE layers of Qwen3-30B-A3B beside a GPU, experts in pinned memory (16-layer cut, no "
        "attention, sticky synthetic routes), bf16, batch 1"
    ),
    "mixtral-8x7b-8-layer-cut-gpu": (
        "MoE layers of Mixtral-8x7B beside a GPU, experts in pinned memory (8-layer cut, no "
        "attention, sticky synthetic routes), bf16, batch 1"
    ),
    "mixtral-8x7b-layers-gpu": (
        "MoE layers of Mixtral-8x7B beside a GPU, experts in pinned memory (32 layers, no "
        "attention, sticky synthetic routes), bf16, batch 1"
    ),
    "mixtral-8x7b-8-layer-cut-gpu-disk": (
        "MoE layers of Mixtral-8x7B beside a GPU, experts on the disk (8-layer cut, no attention, "
        "sticky synthetic routes), bf16, batch 1"
    ),
    "decode-kernel-gpu-qwen3-30b": "Decode pair on the GPU, H 2048, I 768, 8 experts a layer, bf16",
    "decode-kernel-gpu-mixtral": "Decode pair on the GPU, H 4096, I 14336, 2 experts a layer, bf16",
    "gpu-rates": "What doctor measures of the GPU",
    "replay-dsv2lite": (
        "Who should stay: routes of DeepSeek-V2-Lite on three tasks (teacher-forced), per-layer "
        "slots, batch 1, no prefetching"
    ),
    "replay-reference": (
        "The same on the reference model's own text (decode, fitted on text of training prompts)"
    ),
    "recall-dsv2lite-left-out": (
        "Who comes next in a task that nobody was fitted on: DeepSeek-V2-Lite, two others fitted"
    ),
    "recall-reference-states": (
        "Who comes next by the states at hand, the reference model's own text"
    ),
}
FILES = {
    load_scenario(path)["name"]: path.name for path in sorted((HERE / "scenarios").glob("*.toml"))
}


def newest_run(scenario: str, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The clean rows of a scenario's last run, one per mode and metric: of one machine and commit,
    so that what stands together in a table was measured together."""
    mine = [r for r in rows if r["scenario"] == scenario and not r["dirty"]]
    if not mine:
        return []
    last = max(mine, key=lambda r: r["time_utc"])
    run = [r for r in mine if (r["commit"], r["machine"]) == (last["commit"], last["machine"])]
    run.sort(key=lambda r: r["time_utc"])
    return list({(r["mode"], r["metric"]): r for r in run}.values())


def figure(row: dict[str, Any]) -> str:
    """The median with its p20 and p80, in a readable unit."""
    scale, unit = 1.0, row["unit"]
    if unit == "s" and row["p50"] < 1:
        scale, unit = 1e3, "ms"
    elif unit == "B/s":
        scale, unit = 1e-9, "GB/s"
    low, middle, high = (f"{row[k] * scale:.3g}" for k in ("p20", "p50", "p80"))
    return f"{middle} {unit} [{low}, {high}]"


def beside_gpu(row: dict[str, Any]) -> bool:
    """Whether `bytes_read` counts what a GPU's link carried, and `store_bytes_read` the disk."""
    return "h2d_s" in row["limit"]


def moved(row: dict[str, Any]) -> str:
    """Megabytes read from the disk per token, where the arm counts them."""
    value = row["counters"].get("store_bytes_read" if beside_gpu(row) else "bytes_read")
    return f"{value / 1e6:.0f}" if value is not None else "–"


def over_link(row: dict[str, Any]) -> str:
    """Megabytes that the link to the GPU carried per token."""
    return f"{row['counters']['bytes_read'] / 1e6:.0f}" if beside_gpu(row) else "–"


def bound(row: dict[str, Any]) -> str:
    """The term that binds, where the limit has several."""
    return row["limit"].get("bound", "–")


def hit_rate(row: dict[str, Any]) -> str:
    counters = row["counters"]
    if not counters.get("requests"):
        return "–"
    hits = counters.get("hits", counters["requests"] - counters.get("misses", 0))
    return f"{100 * hits / counters['requests']:.0f} %"


def limit(row: dict[str, Any]) -> str:
    achieved = row["limit"].get("achieved")
    return f"{achieved:.2f}" if achieved else "–"


def late(row: dict[str, Any]) -> str:
    """Experts that were on their way when the layer asked, where guesses bring some."""
    counters = row["counters"]
    if "derived" not in row or not counters.get("requests") or "late" not in counters:
        return "–"
    return f"{100 * counters['late'] / counters['requests']:.0f} %"


def saved(row: dict[str, Any]) -> str:
    """The share of lru-overlap's time that the second bound saves which this arm saves."""
    derived = row.get("derived", {})
    return f"{derived['of_bound']:.2f}" if "of_bound" in derived else "–"


def against(key: str) -> Callable[[dict[str, Any]], str]:
    """Tokens/s over those of another arm of the same run."""
    return lambda row: f"{row['derived'][key]:.2f}" if key in row.get("derived", {}) else "–"


def granted(row: dict[str, Any]) -> str:
    """Megabytes that experts were allowed to take."""
    value = row["memory"].get("expert_bytes_granted")
    return f"{value / 1e6:.0f}" if value else "–"


COLUMNS = {
    "arm": lambda r: f"`{r['mode']}`",
    "metric": lambda r: r["metric"],
    "median [p20, p80]": figure,
    "expert MB": granted,
    "disk MB/token": moved,
    "link MB/token": over_link,
    "hits": hit_rate,
    "late": late,
    "over on demand": against("over_demand"),
    "over LRU with overlap": against("over_lru_overlap"),
    "of the bound's saving": saved,
    "over no plans": against("over_undisturbed"),
    "of limit": limit,
    "bound": bound,
    "state": lambda r: r["state"],
    "n": lambda r: str(r["n"]),
}


def by_slots(row: dict[str, Any], figure: str) -> str:
    """A figure of a replay at each number of slots, in percent."""
    shares = sorted(float(k.split("_")[1]) for k in row["derived"] if k.startswith(f"{figure}_"))
    return " / ".join(f"{100 * row['derived'][f'{figure}_{share:g}']:.1f}" for share in shares)


REPLAY_COLUMNS = {
    "stream: contender": lambda r: r["mode"],
    "hits %, by slots": lambda r: by_slots(r, "hits"),
    "gap closed %, by slots": lambda r: by_slots(r, "gap"),
    "mean [95 %]": lambda r: (
        f"{100 * r['p50']:.1f} [{100 * r['derived']['low']:.1f}, {100 * r['derived']['high']:.1f}]"
    ),
    "without shared tokens": lambda r: f"{100 * r['derived']['without_shared_tokens']:.1f}",
    "seeds": lambda r: str(r["n"]),
}


def recalled(row: dict[str, Any], horizon: str) -> str:
    """Recall among the K best at a horizon, its interval and its worst task, in percent."""
    names = [k for k in row["derived"] if k.startswith(f"{horizon}: recall@") and k[-1].isdigit()]
    if not names:
        return "–"
    name = min(names, key=lambda k: int(k.rpartition("@")[2]))
    value, low, high, worst = (
        100 * row["derived"][f"{name}{end}"] for end in ("", " low", " high", " worst task")
    )
    return f"{value:.1f} [{low:.1f}, {high:.1f}], {worst:.1f}"


def united(row: dict[str, Any], horizon: str) -> str:
    """B_acc and precision for four requests at a set of 1.15 times the true one, in percent."""
    name = f"{horizon}: batch 4, 1.15 x the true set"
    if f"{name}: b_acc" not in row["derived"]:
        return "–"
    found = (row["derived"][f"{name}: {each}"] for each in ("b_acc", "precision"))
    return " / ".join(f"{100 * each:.1f}" for each in found)


RECALL_COLUMNS = {
    "predictor": lambda r: r["mode"],
    "one layer ahead: recall@K % [95 %], worst task": lambda r: recalled(r, "1"),
    "two layers ahead": lambda r: recalled(r, "2"),
    "a token ahead": lambda r: recalled(r, "token"),
    "a token ahead, batch 4, 1.15 x: B_acc / precision %": lambda r: united(r, "token"),
    "seeds": lambda r: str(r["n"]),
}


def parts_of(rows: list[dict[str, Any]]) -> list[tuple[dict[str, Any], list[dict[str, Any]]]]:
    """What to say of a run, and of which rows: of a replay the streams of several tasks."""
    gaps = [r for r in rows if r["metric"] == "gap_closed"]
    recalls = [r for r in rows if r["metric"] == "recall_at_k"]
    if not gaps and not recalls:
        return [(COLUMNS, rows)]
    several = [r for r in gaps if r["mode"].startswith(("mix:", "balanced:"))]
    return [(REPLAY_COLUMNS, several), (RECALL_COLUMNS, recalls)]


def table(scenario: str, rows: list[dict[str, Any]]) -> str:
    """One scenario's newest run, without the columns that say nothing there."""
    chosen = newest_run(scenario, rows)
    if not chosen:
        return ""
    one = chosen[0]
    lines = [
        f"**{TITLES[scenario]}** ({one['machine']['cpu']}, {one['threads']} threads, "
        f"{one['machine']['ram_gib']:g} GiB; commit {one['commit']}; "
        f"`sluice bench benchmarks/scenarios/{FILES[scenario]}`)",
    ]
    for columns, part in parts_of(chosen):
        if not part:
            continue
        cells = {name: [cell(row) for row in part] for name, cell in columns.items()}
        cells = {name: column for name, column in cells.items() if set(column) != {"–"}}
        lines += [
            "",
            *("| " + " | ".join(line) + " |" for line in (cells, ["---"] * len(cells))),
            *("| " + " | ".join(line) + " |" for line in zip(*cells.values(), strict=True)),
        ]
    return "\n".join(lines) + "\n"


def tables(results: Path) -> str:
    rows = [row for path in sorted(results.rglob("*.jsonl")) for row in load_rows(path)]
    return "\n".join(t for t in (table(name, rows) for name in TITLES) if t)


def rewrite(readme: str, body: str) -> str:
    """The README with everything between the marks replaced."""
    begin, end = readme.index(BEGIN) + len(BEGIN), readme.index(END)
    return f"{readme[:begin]}\n{body}{readme[end:]}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help="into README.md")
    args = parser.parse_args()
    body = tables(HERE / "results")
    if args.write:
        readme = HERE.parent / "README.md"
        readme.write_text(rewrite(readme.read_text(), body))
    else:
        sys.stdout.write(body)
    return 0


if __name__ == "__main__":
    sys.exit(main())
