"""`sluice plan`: what a budget buys, before anything is loaded."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sluice.cli.common import Outcome, add_budget, add_host_memory
from sluice.config import OffloadOptions
from sluice.errors import ConfigError
from sluice.folders import cache_folder
from sluice.limit import (
    REFERENCE_MACHINES,
    Limit,
    MachinePrediction,
    device_rates,
    predict,
    prediction_text,
)
from sluice.memory import available_bytes
from sluice.plan import ModelPlan, plan_model, table_of
from sluice.text import format_bytes


def add_parser(verbs: Any) -> argparse.ArgumentParser:
    """Registers the verb."""
    parser: argparse.ArgumentParser = verbs.add_parser(
        "plan",
        help="what a budget buys: slots, waves, bytes per token, disk, limits",
        description="Builds the model of a config.json on the meta device (no weights are read), "
        "finds its experts as a session would, and says what a budget buys: slots, bytes per "
        "token, and the limit in tokens/s by the constants that `sluice doctor` measured; where "
        "no GPU was measured, by those of two machines that are named as assumptions.",
    )
    parser.add_argument("model", metavar="MODEL_DIR_OR_CONFIG", help="a folder or a config.json")
    add_budget(parser, default=None, help_tail="without it a table of budgets")
    add_host_memory(parser)
    parser.set_defaults(run=run)
    return parser


def run(args: argparse.Namespace) -> Outcome:
    """Plans."""
    plan, dense_bytes = plan_path(args.model, args.device_memory)
    from sluice import doctor

    constants = doctor.load_constants(cache_folder())
    on_gpu = predictions(plan, dense_bytes, constants, args.host_memory)
    payload = plan.to_dict() | {
        "dense_bytes": dense_bytes,
        "constants": constants.to_dict() if constants else None,
        "predictions": [found.to_dict() for found in on_gpu],
    }
    return Outcome(payload, text_of(plan, constants, on_gpu))


def plan_path(model: str, device_memory: str | int | None) -> tuple[ModelPlan, int]:
    """Plans a folder or a config.json; also the bytes that a token reads beside experts.

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
    from sluice.hf.auto import dense_bytes_of
    from sluice.hf.describe import build_on_meta, layers_of
    from sluice.hf.detect import find_expert_sites

    built = build_on_meta(config)
    sites = find_expert_sites(built)
    experts = sum(p.numel() * p.element_size() for site in sites for p in site.module.parameters())
    plan = plan_model(str(config), layers_of(built, sites), device_memory)
    return plan, dense_bytes_of(built) - experts


def predictions(
    plan: ModelPlan, dense_bytes: int, constants: Any, host_memory: str | int | None = None
) -> list[MachinePrediction]:
    """By this machine's GPU where doctor measured one, else by machines that are assumed.

    Args:
        plan: The model and its budgets.
        dense_bytes: Read for every token beside experts.
        constants: Measured by `sluice doctor`, or None.
        host_memory: As a session's; without it what a session here would take, and every expert
            on a machine that is assumed.

    Raises:
        ConfigError: `host_memory` is no size.
    """
    rates = None if constants is None else device_rates(constants)
    host_bytes = plan.total_bytes
    if rates is not None or host_memory is not None:
        options = OffloadOptions(device_memory="100%", host_memory=host_memory)
        host_bytes = options.host_tier_bytes(plan.total_bytes, available_bytes())
    return [
        predict(plan, dense_bytes, machine, host_bytes=host_bytes, assumed=rates is None)
        for machine in (REFERENCE_MACHINES if rates is None else (rates,))
    ]


def text_of(plan: ModelPlan, constants: Any, on_gpu: Sequence[MachinePrediction]) -> str:
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
        "read/token: bytes into slots per decoded token, from disk or over the link to a GPU, if "
        "routing were uniform and memoryless; real routing repeats itself and reads less. at most: "
        "nothing asked for is in a slot.",
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
    for found in on_gpu:
        lines += ["", prediction_text(found)]
    lines += [
        "",
        "limits are bandwidths alone under uniform routing: real caches miss less, and launches, "
        "hand-offs and Python come on top; h2d: the link to the GPU"
        + (
            "; on a machine with a GPU `sluice doctor` measures its own"
            if any(found.assumed for found in on_gpu)
            else ""
        ),
    ]
    return "\n".join(lines)


def _limit(plan: ModelPlan, constants: Any) -> str:
    """The physical limit of each budget on this machine's CPU, with its measured constants."""
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
        f"limit on the CPU by this machine's disk ({disk / 1e9:.2f} GB/s) and memory "
        f"({memory / 1e9:.1f} GB/s), experts alone, uniform routing: {', '.join(parts)}"
    )
