"""Prints the tables of README.md and foresight.md from committed, clean rows; `--write`: there."""

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

import foresight_report  # noqa: E402
from result_tables import NOTHING, Row, all_rows, caption, fill, newest_run, table_of  # noqa: E402

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
}


def figure(row: Row) -> str:
    """The median with its p20 and p80, in a readable unit."""
    scale, unit = 1.0, row["unit"]
    if unit == "s" and row["p50"] < 1:
        scale, unit = 1e3, "ms"
    elif unit == "B/s":
        scale, unit = 1e-9, "GB/s"
    low, middle, high = (f"{row[k] * scale:.3g}" for k in ("p20", "p50", "p80"))
    return f"{middle} {unit} [{low}, {high}]"


def beside_gpu(row: Row) -> bool:
    """Whether `bytes_read` counts what a GPU's link carried, and `store_bytes_read` the disk."""
    return "h2d_s" in row["limit"]


def moved(row: Row) -> str:
    """Megabytes read from the disk per token, where the arm counts them."""
    value = row["counters"].get("store_bytes_read" if beside_gpu(row) else "bytes_read")
    return f"{value / 1e6:.0f}" if value is not None else NOTHING


def over_link(row: Row) -> str:
    """Megabytes that the link to the GPU carried per token."""
    return f"{row['counters']['bytes_read'] / 1e6:.0f}" if beside_gpu(row) else NOTHING


def bound(row: Row) -> str:
    """The term that binds, where the limit has several."""
    return row["limit"].get("bound", NOTHING)


def hit_rate(row: Row) -> str:
    counters = row["counters"]
    if not counters.get("requests"):
        return NOTHING
    hits = counters.get("hits", counters["requests"] - counters.get("misses", 0))
    return f"{100 * hits / counters['requests']:.0f} %"


def limit(row: Row) -> str:
    achieved = row["limit"].get("achieved")
    return f"{achieved:.2f}" if achieved else NOTHING


def late(row: Row) -> str:
    """Experts that were on their way when the layer asked, where guesses bring some."""
    counters = row["counters"]
    if "derived" not in row or not counters.get("requests") or "late" not in counters:
        return NOTHING
    return f"{100 * counters['late'] / counters['requests']:.0f} %"


def saved(row: Row) -> str:
    """The share of lru-overlap's time that the second bound saves which this arm saves."""
    derived = row.get("derived", {})
    return f"{derived['of_bound']:.2f}" if "of_bound" in derived else NOTHING


def against(key: str) -> Callable[[Row], str]:
    """Tokens/s over those of another arm of the same run."""
    return lambda row: f"{row['derived'][key]:.2f}" if key in row.get("derived", {}) else NOTHING


def granted(row: Row) -> str:
    """Megabytes that experts were allowed to take."""
    value = row["memory"].get("expert_bytes_granted")
    return f"{value / 1e6:.0f}" if value else NOTHING


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


def tables(rows: Sequence[Row]) -> str:
    """Of each scenario with rows its newest run."""
    runs = {scenario: newest_run(scenario, rows) for scenario in TITLES}
    return "\n".join(
        f"{caption(TITLES[scenario], run)}\n\n{table_of(COLUMNS, run)}\n"
        for scenario, run in runs.items()
        if run
    )


def documents(rows: Sequence[Row]) -> dict[Path, dict[str, str]]:
    """Of each document with rows what stands between its marks, by their names."""
    return {
        HERE.parent / "README.md": {"measured": tables(rows)},
        HERE / "foresight.md": foresight_report.tables(rows),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help="into README.md and foresight.md")
    args = parser.parse_args()
    for path, bodies in documents(all_rows(HERE / "results")).items():
        if args.write:
            path.write_text(fill(path.read_text(), bodies))
        else:
            sys.stdout.write("".join(f"{body}\n" for body in bodies.values() if body))
    return 0


if __name__ == "__main__":
    sys.exit(main())
