"""`sluice plan`: what a budget buys, before anything is loaded."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from sluice.cli.common import Outcome, add_budget
from sluice.errors import ConfigError
from sluice.folders import cache_folder
from sluice.limit import Limit
from sluice.plan import ModelPlan, plan_model, table_of
from sluice.text import format_bytes


def add_parser(verbs: Any) -> argparse.ArgumentParser:
    """Registers the verb."""
    parser: argparse.ArgumentParser = verbs.add_parser(
        "plan",
        help="what a budget buys: slots, waves, bytes per token, disk",
        description="Builds the model of a config.json on the meta device (no weights are read), "
        "finds its experts as a session would, and says what a budget buys.",
    )
    parser.add_argument("model", metavar="MODEL_DIR_OR_CONFIG", help="a folder or a config.json")
    add_budget(parser, default=None, help_tail="without it a table of budgets")
    parser.set_defaults(run=run)
    return parser


def run(args: argparse.Namespace) -> Outcome:
    """Plans."""
    plan = plan_path(args.model, args.device_memory)
    from sluice import doctor

    constants = doctor.load_constants(cache_folder())
    payload = plan.to_dict() | {"constants": constants.to_dict() if constants else None}
    return Outcome(payload, text_of(plan, constants))


def plan_path(model: str, device_memory: str | int | None) -> ModelPlan:
    """Plans a folder or a config.json.

    Raises:
        ConfigError: There is neither, transformers is missing, or the budget is no size.
        UnsupportedModelError: The model has no experts that sluice knows.
        CapacityError: The budget is too small.
    """
    path = Path(model).expanduser()
    config = path / "config.json" if path.is_dir() else path
    if not config.is_file():
        raise ConfigError(
            f"sluice plan: got {model!r}, expected a checkpoint folder or a config.json; "
            "nothing is downloaded"
        )
    from sluice.hf.describe import describe_model

    return plan_model(str(config), describe_model(config), device_memory)


def text_of(plan: ModelPlan, constants: Any) -> str:
    """The plan for people."""
    first = plan.layers[0]
    experts = sum(layer.num_experts for layer in plan.layers)
    sizes = sorted({layer.slot_bytes for layer in plan.layers})
    lines = [
        f"{plan.model}: {len(plan.layers)} MoE layers, {experts} experts, top {first.top_k}, "
        f"{first.dtype}; one takes {' or '.join(map(format_bytes, sizes))}, "
        f"all {format_bytes(plan.total_bytes)}",
        "",
        table_of(plan),
        "",
        "read/token: bytes from disk per decoded token if routing were uniform and memoryless; "
        "real routing repeats itself and reads less. at most: nothing asked for is in a slot.",
        f"least budget {format_bytes(plan.least_bytes)} ({plan.least_bytes} bytes); reading "
        f"overlaps computing from {format_bytes(plan.overlap_bytes)}; one layer at once takes "
        f"{format_bytes(plan.layer_bytes)}",
        f"beside the budget: {format_bytes(plan.workspace_bytes)} of workspace while decoding one "
        f"sequence, and at least {format_bytes(plan.prompt_bytes_per_token)} more for each token "
        f"of a prompt; a pack would take {format_bytes(plan.pack_bytes)} of disk",
    ]
    waves = [budget.label for budget in plan.budgets if budget.waves_at_decode > 1]
    if waves:
        lines.append(
            f"in waves at {', '.join(waves)}: fewer slots than one token's layer asks for; it "
            "works, slowly, and is counted as waves_at_decode"
        )
    lines.append(_limit(plan, constants))
    return "\n".join(lines)


def _limit(plan: ModelPlan, constants: Any) -> str:
    """The physical limit of each budget with this machine's measured constants."""
    if constants is None:
        return "run `sluice doctor` once and plan adds this machine's limit in tokens/s"
    disk, memory = constants.best_disk_bytes_per_s, constants.memory_bytes_per_s
    experts_s = sum(layer.top_k * layer.expert_bytes for layer in plan.layers) / memory
    parts: list[str] = []
    for budget in plan.budgets:
        disk_s = budget.expected_bytes_per_token / disk if disk else 0.0
        limit = Limit(disk_s=disk_s, experts_s=experts_s, dense_s=0.0)
        parts.append(f"{budget.label} {1 / limit.seconds:,.0f} tok/s")
    return (
        f"limit by this machine's disk ({disk / 1e9:.2f} GB/s) and memory "
        f"({memory / 1e9:.1f} GB/s), experts alone, uniform routing: {', '.join(parts)}"
    )
