"""Prints the README's tables from committed, clean rows, between its `<!-- rows -->` marks."""

import argparse
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

from compare import load_rows  # noqa: E402

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
    "kernel-dsv2lite": "Few-token kernel, H 2048, I 1408, bf16, beyond the last-level cache",
    "kernel-qwen3-30b": "Few-token kernel, H 2048, I 768, bf16, beyond the last-level cache",
}


def latest(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of each scenario, mode and metric the newest clean row."""
    newest: dict[tuple[str, str, str], dict[str, Any]] = {}
    for row in sorted(rows, key=lambda r: r["time_utc"]):
        if not row["dirty"]:
            newest[row["scenario"], row["mode"], row["metric"]] = row
    return list(newest.values())


def figure(row: dict[str, Any]) -> str:
    """The median with its p20 and p80, in a readable unit."""
    scale, unit = 1.0, row["unit"]
    if unit == "s":
        scale, unit = 1e3, "ms"
    elif unit == "B/s":
        scale, unit = 1e-9, "GB/s"
    low, middle, high = (f"{row[k] * scale:.3g}" for k in ("p20", "p50", "p80"))
    return f"{middle} {unit} [{low}, {high}]"


def moved(row: dict[str, Any]) -> str:
    """Megabytes read from the disk per token, where the arm counts them."""
    value = row["counters"].get("bytes_read")
    return f"{value / 1e6:.0f}" if value is not None else "–"


def hit_rate(row: dict[str, Any]) -> str:
    counters = row["counters"]
    if not counters.get("requests"):
        return "–"
    hits = counters.get("hits", counters["requests"] - counters.get("misses", 0))
    return f"{100 * hits / counters['requests']:.0f} %"


def limit(row: dict[str, Any]) -> str:
    achieved = row["limit"].get("achieved")
    return f"{achieved:.2f}" if achieved else "–"


def table(scenario: str, rows: list[dict[str, Any]]) -> str:
    chosen = [row for row in rows if row["scenario"] == scenario]
    if not chosen:
        return ""
    one = chosen[0]
    out = [
        f"**{TITLES[scenario]}** ({one['machine']['cpu']}, {one['threads']} threads, "
        f"{one['machine']['ram_gib']:g} GiB; commit {one['commit']})",
        "",
    ]
    out += [
        "| arm | metric | median [p20, p80] | disk MB/token | hits | of limit | state | n |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    out += [
        f"| `{r['mode']}` | {r['metric']} | {figure(r)} | {moved(r)} | {hit_rate(r)} | {limit(r)} "
        f"| {r['state']} | {r['n']} |"
        for r in chosen
    ]
    return "\n".join(out) + "\n"


def tables(results: Path) -> str:
    rows = latest([row for path in sorted(results.rglob("*.jsonl")) for row in load_rows(path)])
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
