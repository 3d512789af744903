"""What a model's tokens take when a share of its experts is resident and routing is uniform."""

from __future__ import annotations

from dataclasses import dataclass

from sluice.limit.model import LayerWork, Rates, Terms, cpu_share, step_terms

MISSES = ("link", "cpu", "split")


@dataclass(frozen=True, slots=True, kw_only=True)
class MoeModel:
    """A model as far as the limit is concerned.

    Args:
        num_layers: L, MoE layers.
        num_experts: E, of each.
        top_k: K, experts that one token asks for in each.
        expert_bytes: Of one expert at the precision it is stored in.
        dense_bytes: Read for every token beside experts.
    """

    num_layers: int
    num_experts: int
    top_k: int
    expert_bytes: float
    dense_bytes: float

    @property
    def token_bytes(self) -> float:
        """Of the experts that one token asks for."""
        return self.num_layers * self.top_k * self.expert_bytes

    @property
    def total_bytes(self) -> float:
        """Of all experts."""
        return self.num_layers * self.num_experts * self.expert_bytes

    def missed_bytes(self, resident_share: float) -> float:
        """Per token, were the hit rate the resident share: real caches do better."""
        return self.token_bytes * (1 - resident_share)


def missed_work(
    rates: Rates,
    *,
    dense_bytes: float,
    asked_bytes: float,
    missed_bytes: float,
    in_ram_share: float = 1.0,
    misses: str = "link",
) -> LayerWork:
    """One layer's work for one token.

    Args:
        rates: Of the machine; a split depends on them.
        dense_bytes: Of the layer's dense part.
        asked_bytes: Of the experts that the token asks for.
        missed_bytes: What of it is in no slot.
        in_ram_share: What of the missed bytes is in RAM; the rest comes from the disk first.
        misses: Who serves them: "link", "cpu", or "split": the host and the link at once, such that
            both end together. Sessions have "link"; no miss policy of another name exists yet.
    """
    if misses not in MISSES:
        raise ValueError(f"misses: got {misses!r}, expected one of {', '.join(MISSES)}")
    on_host = {"link": 0.0, "cpu": 1.0}.get(misses)
    if on_host is None:
        on_host = cpu_share(rates)
    return LayerWork(
        dense_bytes=dense_bytes,
        hit_bytes=asked_bytes - missed_bytes,
        fetched_bytes=missed_bytes * (1 - on_host),
        cpu_bytes=missed_bytes * on_host,
        store_bytes=missed_bytes * (1 - in_ram_share),
    )


def expected_token(
    model: MoeModel,
    rates: Rates,
    resident_share: float,
    *,
    in_ram_share: float = 1.0,
    misses: str = "link",
) -> Terms:
    """One decoded token's terms; `seconds` is its time. Arguments as `missed_work` takes them."""
    layers = model.num_layers
    work = missed_work(
        rates,
        dense_bytes=model.dense_bytes / layers,
        asked_bytes=model.token_bytes / layers,
        missed_bytes=model.missed_bytes(resident_share) / layers,
        in_ram_share=in_ram_share,
        misses=misses,
    )
    return step_terms(rates, [work] * layers)
