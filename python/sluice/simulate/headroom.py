"""What prediction can gain at most on a machine: bounds that know what comes, beside the rest."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from sluice.simulate.guesses import next_use_scores, oracle_guesses
from sluice.simulate.replay import gap_closed, replay
from sluice.simulate.routes import Routes
from sluice.simulate.timed import Machine, run_timed
from sluice.text import format_bytes, table

DEMAND_ONLY = "lru"
CAUSAL = "decayed-lfu"


@dataclass(frozen=True, slots=True, kw_only=True)
class Arm:
    """One way to run the trace.

    Args:
        name: What it is.
        tokens_per_second: On the virtual clock.
        hit_share: Ready when their layer asked.
        late_share: On their way by then.
        demand_bytes_per_token: Read because a layer asked.
        wasted_bytes_per_token: Read for a guess and not used.
    """

    name: str
    tokens_per_second: float
    hit_share: float
    late_share: float
    demand_bytes_per_token: float
    wasted_bytes_per_token: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Headroom:
    """What foresight is worth on one machine with one budget.

    Args:
        slots: Experts that memory holds, of all layers together.
        experts: All experts there are.
        expert_bytes: Of one.
        machine: What takes time.
        arms: In order: causal ones, then what knows more and more of the future.
        link_bound: Tokens/s if only the last arm's bytes took time.
        victims: Of the way from LRU's misses to Belady's, per layer at equal slots: what the causal
            policy closes, and what of the rest is whom to evict and whom not to keep at all.
    """

    slots: int
    experts: int
    expert_bytes: int
    machine: Machine
    arms: tuple[Arm, ...]
    link_bound: float
    victims: dict[str, float]

    def to_dict(self) -> dict[str, Any]:
        """All of it as JSON can hold it."""
        import dataclasses

        return dataclasses.asdict(self)


def headroom(routes: Routes, machine: Machine, *, expert_bytes: int, slots: int) -> Headroom:
    """Runs a trace under causal policies and under bounds that know what comes.

    Args:
        routes: Of `routes_of`.
        machine: What takes time.
        expert_bytes: Of one expert as stored.
        slots: Experts that memory holds, of all layers together.

    Raises:
        ConfigError: What does not fit, by name.
    """
    future = next_use_scores(routes)
    token = routes.num_layers
    plans: list[tuple[str, dict[str, Any]]] = [
        ("lru, on demand", {"policy": DEMAND_ONLY}),
        ("decayed-lfu, on demand", {"policy": CAUSAL}),
        ("+ next layer's routes", {"policy": CAUSAL, "guesses": oracle_guesses(routes, 1)}),
        ("+ a token's routes", {"policy": CAUSAL, "guesses": oracle_guesses(routes, token)}),
        ("Belady's victims", {"policy": "forecast:always", "scores": future}),
        (
            "Belady's victims + a token's routes",
            {
                "policy": "forecast:always",
                "scores": future,
                "guesses": oracle_guesses(routes, token),
            },
        ),
    ]
    arms: list[Arm] = []
    bytes_per_token = 0.0
    for name, settings in plans:
        run = run_timed(routes, machine, expert_bytes=expert_bytes, slots=slots, **settings)
        stats, requests = run.stats, max(1, run.stats.requests)
        arms.append(
            Arm(
                name=name,
                tokens_per_second=run.tokens_per_second,
                hit_share=stats.hits / requests,
                late_share=stats.late / requests,
                demand_bytes_per_token=stats.bytes_read_demand / run.num_tokens,
                wasted_bytes_per_token=stats.bytes_read_hint_wasted / run.num_tokens,
            )
        )
        bytes_per_token = stats.bytes_read / run.num_tokens
    return Headroom(
        slots=slots,
        experts=routes.num_layers * routes.num_experts,
        expert_bytes=expert_bytes,
        machine=machine,
        arms=tuple(arms),
        link_bound=machine.bytes_per_second / bytes_per_token if bytes_per_token else float("inf"),
        victims=_victims(routes, max(1, slots // routes.num_layers)),
    )


def _victims(routes: Routes, slots: int) -> dict[str, float]:
    """Shares of the LRU to Belady gap, replacement alone."""
    lru = replay(routes, DEMAND_ONLY, slots).miss_ratio
    causal = replay(routes, CAUSAL, slots).miss_ratio
    belady = replay(routes, "belady", slots).miss_ratio
    forced = replay(routes, "belady", slots, bypass=False).miss_ratio
    closed = gap_closed(lru, causal, belady)
    rest = causal - belady
    return {
        "lru_miss_ratio": lru,
        "causal_miss_ratio": causal,
        "belady_miss_ratio": belady,
        "closed_by_causal": closed,
        "rest_is_admission": (forced - belady) / rest if rest > 0 else float("nan"),
        "rest_is_victims": (causal - forced) / rest if rest > 0 else float("nan"),
    }


def headroom_text(found: Headroom) -> str:
    """One page for a person."""
    base = found.arms[1].tokens_per_second
    rows = [
        (
            arm.name,
            f"{arm.tokens_per_second:,.1f}",
            f"{arm.tokens_per_second / base:.2f}x",
            f"{100 * arm.hit_share:.1f} %",
            f"{100 * arm.late_share:.1f} %",
            format_bytes(arm.demand_bytes_per_token),
            format_bytes(arm.wasted_bytes_per_token),
        )
        for arm in found.arms
    ]
    machine, victims = found.machine, found.victims
    head = ("", "tok/s", f"vs {CAUSAL}", "hits", "late", "demand/token", "wasted/token")
    return "\n".join(
        [
            f"{found.slots} of {found.experts} experts in memory "
            f"({100 * found.slots / found.experts:.1f} %), one takes "
            f"{format_bytes(found.expert_bytes)}; link {machine.bytes_per_second / 1e9:.3g} GB/s, "
            f"dense part {1e3 * machine.dense_seconds:.3g} ms a layer, an expert "
            f"{1e3 * machine.expert_seconds:.3g} ms; virtual clock",
            "",
            table(head, rows),
            "",
            f"the last row's bytes over the link alone: {found.link_bound:,.1f} tok/s",
            f"replacement alone, per layer at the same share: LRU misses "
            f"{100 * victims['lru_miss_ratio']:.1f} %, {CAUSAL} "
            f"{100 * victims['causal_miss_ratio']:.1f} % "
            f"({100 * victims['closed_by_causal']:.0f} % of the way to Belady's "
            f"{100 * victims['belady_miss_ratio']:.1f} %); of the rest "
            f"{100 * victims['rest_is_victims']:.0f} % is whom to evict, "
            f"{100 * victims['rest_is_admission']:.0f} % whom not to keep",
        ]
    )
