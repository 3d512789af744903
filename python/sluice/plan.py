"""What a byte budget buys, from the shapes of a model's experts alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from sluice import _core
from sluice.config import OffloadOptions
from sluice.text import format_bytes, table

_SHARES = (100.0, 50.0, 25.0, 12.5)
_PACK_ALIGNMENT = 4096  # experts start and end on multiples of it
_CHUNK_MARGIN_BYTES = 8 << 10
_MOST_BOUNCE_BYTES = 16 << 20


@dataclass(frozen=True, slots=True)
class LayerShape:
    """One MoE layer, as far as memory is concerned.

    Args:
        name: Module path of the experts.
        num_experts: E.
        top_k: K, experts that one token asks for.
        hidden: H, the width that experts see.
        dtype: "F32", "BF16" or "F16".
        expert_bytes: Bytes of one expert.
        slot_bytes: The same in a slot, padded.
    """

    name: str
    num_experts: int
    top_k: int
    hidden: int
    dtype: str
    expert_bytes: int
    slot_bytes: int


@dataclass(frozen=True, slots=True)
class Budget:
    """What one budget buys.

    Args:
        label: As it was asked for, or why it is in the table.
        budget_bytes: The budget.
        slab_bytes: What of it becomes slots.
        slots: Experts that fit at once.
        resident_share: Slots by experts.
        waves_at_decode: Rounds that one token's layer takes; more than 1 is slow and counted.
        expected_bytes_per_token: Read per decoded token were routing uniform and memoryless, which
            is a floor for the cache: real routing does better.
        most_bytes_per_token: The same when nothing asked for is in a slot.
    """

    label: str
    budget_bytes: int
    slab_bytes: int
    slots: int
    resident_share: float
    waves_at_decode: int
    expected_bytes_per_token: int
    most_bytes_per_token: int


@dataclass(frozen=True, slots=True)
class ModelPlan:
    """A model's experts and what budgets buy.

    Args:
        model: Class or folder, for the heading.
        layers: Every MoE layer.
        total_bytes: Slot bytes of all experts: what "100%" means.
        least_bytes: One slot of each size: below it nothing works.
        overlap_bytes: Two of each size: from here on reading overlaps computing.
        layer_bytes: The largest layer at once.
        pack_bytes: Disk that a pack takes, its header apart.
        workspace_bytes: Beside the budget while decoding one sequence, where slots are RAM: bounce
            buffers and scratch. A GPU's scratch is larger.
        prompt_bytes_per_token: What each token of a prompt adds to it, and a little more.
        budgets: One row each.
    """

    model: str
    layers: tuple[LayerShape, ...]
    total_bytes: int
    least_bytes: int
    overlap_bytes: int
    layer_bytes: int
    pack_bytes: int
    workspace_bytes: int
    prompt_bytes_per_token: int
    budgets: tuple[Budget, ...]

    def to_dict(self) -> dict[str, Any]:
        """As JSON spells it."""
        return asdict(self)


def plan_model(
    model: str,
    layers: Sequence[LayerShape],
    device_memory: str | int | None = None,
) -> ModelPlan:
    """Plans one budget, or a table of them.

    Args:
        model: For the heading.
        layers: Every MoE layer.
        device_memory: A size, a share, or None for the table.

    Raises:
        CapacityError: The budget is below one slot per size; the message names those that work.
        ConfigError: The budget is no size.
    """
    sizes = sorted({layer.slot_bytes for layer in layers})
    total = sum(layer.slot_bytes * layer.num_experts for layer in layers)
    if device_memory is None:
        asked = [(f"{share:.3g}%", int(total * share / 100)) for share in _SHARES]
        asked = [(label, size) for label, size in asked if size >= sum(sizes)]
        asked += [("two slots", 2 * sum(sizes)), ("least", sum(sizes))]
    else:
        options = OffloadOptions(device_memory=device_memory)
        asked = [(str(device_memory), options.budget_bytes(total))]
    largest = max(layer.expert_bytes for layer in layers)
    options = OffloadOptions(device_memory="100%")  # what a session has unless it is told otherwise
    chunk = min(options.chunk_bytes_as_int(), largest) + _CHUNK_MARGIN_BYTES
    bounce = min(options.io_threads * chunk, _MOST_BOUNCE_BYTES)
    scratch = max(layer.top_k * layer.hidden for layer in layers) * 4
    return ModelPlan(
        model=model,
        layers=tuple(layers),
        total_bytes=total,
        least_bytes=sum(sizes),
        overlap_bytes=2 * sum(sizes),
        layer_bytes=max(layer.slot_bytes * layer.num_experts for layer in layers),
        pack_bytes=sum(
            -(-layer.expert_bytes // _PACK_ALIGNMENT) * _PACK_ALIGNMENT * layer.num_experts
            for layer in layers
        ),
        workspace_bytes=bounce + scratch,
        prompt_bytes_per_token=scratch,
        budgets=tuple(_buy(label, size, layers) for label, size in asked),
    )


def table_of(plan: ModelPlan) -> str:
    """The budgets, a line each."""
    head = ("budget", "bytes", "slots", "of all", "waves", "read/token", "at most")
    rows = [
        (
            budget.label,
            format_bytes(budget.budget_bytes),
            str(budget.slots),
            f"{budget.resident_share:.1%}",
            str(budget.waves_at_decode),
            format_bytes(budget.expected_bytes_per_token),
            format_bytes(budget.most_bytes_per_token),
        )
        for budget in plan.budgets
    ]
    return table(head, rows)


def _buy(label: str, budget_bytes: int, layers: Sequence[LayerShape]) -> Budget:
    shapes = [(layer.slot_bytes, layer.num_experts) for layer in layers]
    plan = _core.plan_memory(budget_bytes, shapes)
    classes = [plan["classes"][index] for index in plan["class_of_layer"]]
    slots = sum(entry["num_slots"] for entry in plan["classes"])
    expected, most, waves = 0.0, 0, 1
    for layer, entry in zip(layers, classes, strict=True):
        asked = min(layer.top_k, layer.num_experts)
        most += asked * layer.expert_bytes
        missing = 1 - entry["num_slots"] / entry["num_experts"]
        expected += asked * layer.expert_bytes * missing
        waves = max(waves, -(-asked // entry["num_slots"]))
    return Budget(
        label=label,
        budget_bytes=budget_bytes,
        slab_bytes=plan["slab_bytes"],
        slots=slots,
        resident_share=slots / sum(layer.num_experts for layer in layers),
        waves_at_decode=waves,
        expected_bytes_per_token=round(expected),
        most_bytes_per_token=most if slots < sum(n for _, n in shapes) else 0,
    )
