"""What the limit model says of each budget of a plan, on a GPU measured here or assumed by name."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from sluice.limit.expected import missed_work
from sluice.limit.model import Rates, layer_terms
from sluice.text import format_bytes, table

if TYPE_CHECKING:
    from sluice.plan import ModelPlan


@dataclass(frozen=True, slots=True, kw_only=True)
class Prediction:
    """One budget on one machine: a decoded token, were routing uniform, by bandwidths alone.

    Args:
        label: The budget's.
        missed_bytes_per_token: Over the link.
        store_bytes_per_token: What of it is not in RAM and comes from the disk first.
        seconds_per_token: The limit.
        tokens_per_s: The same the other way round.
        bound: The largest term: "h2d" (the link), "disk", "experts" or "dense".
        terms: Seconds by term.
    """

    label: str
    missed_bytes_per_token: int
    store_bytes_per_token: int
    seconds_per_token: float
    tokens_per_s: float
    bound: str
    terms: dict[str, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class MachinePrediction:
    """Every budget of a plan on one machine.

    Args:
        rates: The machine.
        assumed: Whether its rates are assumptions, not measurements.
        host_bytes: RAM for experts beside the GPU; misses beyond come from the disk.
        budgets: One each.
    """

    rates: Rates
    assumed: bool
    host_bytes: int
    budgets: tuple[Prediction, ...]

    def to_dict(self) -> dict[str, Any]:
        """As JSON spells it."""
        return asdict(self)


def predict(
    plan: ModelPlan, dense_bytes: int, rates: Rates, *, host_bytes: int, assumed: bool
) -> MachinePrediction:
    """The limit of each budget.

    Args:
        plan: The model and its budgets.
        dense_bytes: Read for every token beside experts.
        rates: The machine.
        host_bytes: RAM for experts, at most what all of them take.
        assumed: Whether the rates are assumptions.
    """
    rates = rates.bandwidths_only()
    asked = sum(min(each.top_k, each.num_experts) * each.expert_bytes for each in plan.layers)
    in_ram_share = min(1.0, host_bytes / plan.total_bytes)
    budgets: list[Prediction] = []
    for budget in plan.budgets:
        work = missed_work(
            rates,
            dense_bytes=dense_bytes,
            asked_bytes=asked,
            missed_bytes=budget.expected_bytes_per_token,
            in_ram_share=in_ram_share,
        )
        terms = layer_terms(rates, work)
        budgets.append(
            Prediction(
                label=budget.label,
                missed_bytes_per_token=budget.expected_bytes_per_token,
                store_bytes_per_token=round(work.store_bytes),
                seconds_per_token=terms.seconds,
                tokens_per_s=1 / terms.seconds,
                bound=terms.bound,
                terms=terms.to_dict(),
            )
        )
    return MachinePrediction(
        rates=rates, assumed=assumed, host_bytes=host_bytes, budgets=tuple(budgets)
    )


def prediction_text(found: MachinePrediction) -> str:
    """One machine's budgets as a table, under its name and its constants."""
    rates = found.rates
    origin = "assumed, not measured" if found.assumed else "measured by sluice doctor"
    constants = (
        f"GPU memory {rates.memory_bytes_per_s / 1e9:,.0f} GB/s, "
        f"link {rates.link_bytes_per_s / 1e9:.1f} GB/s, "
    )
    if any(budget.store_bytes_per_token for budget in found.budgets):
        disk = rates.disk_bytes_per_s
        rate = f"{disk / 1e9:.2f} GB/s" if disk else "not measured and left out"
        constants += f"{format_bytes(found.host_bytes)} of experts in RAM, disk {rate}"
    else:
        constants += "every expert in RAM"
    rows = [
        (
            budget.label,
            format_bytes(budget.missed_bytes_per_token),
            f"{budget.seconds_per_token * 1e3:.3g}",
            f"{budget.tokens_per_s:.3g}" if budget.tokens_per_s < 100
            else f"{budget.tokens_per_s:,.0f}",
            budget.bound,
        )
        for budget in found.budgets
    ]  # fmt: skip
    return f"limit on a GPU, {rates.name} ({origin}: {constants}):\n" + table(
        ("budget", "missed/token", "ms/token", "tok/s", "bound"), rows
    )
