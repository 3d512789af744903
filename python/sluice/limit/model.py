"""The limit model: what bytes take at the measured rates of a machine.

After routing, the distinct experts of a layer are H (in a slot), F (fetched over the link) and C
(computed by the host), b bytes each:

    T_link = τ_f·[F≠∅] + Σ_F b/BW_link
    T_cpu  = τ_c·[C≠∅] + Σ_C max(b/BW_cpu, multiply-adds/MAC_cpu)
    T_disk = Σ_{F∪C not in RAM} b/BW_disk
    T_l    = dense/BW_hbm + launches·τ_k
             + max(Σ_{H∪F} b/BW_hbm, T_link + b_last/BW_hbm, T_cpu, T_disk)
    T_step = Σ_l T_l

Where slots are RAM there is no link: F comes from the disk, and BW_hbm is the RAM's rate.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace


@dataclass(frozen=True, slots=True, kw_only=True)
class Rates:
    """Measured constants of one machine.

    A rate of 0 is one that nobody measured: what it would bound takes no time, so that a limit
    stays a limit, only looser.

    Args:
        name: Whose they are, for labels.
        memory_bytes_per_s: BW_hbm: reads of the memory that slots lie in.
        link_bytes_per_s: BW_link: copies from pinned memory to the device; 0 where slots are RAM.
        link_latency_s: t0: what a copy takes besides its bytes, alone on the link.
        host_bytes_per_s: BW_dram: reads of RAM by all cores, which the CPU and the link share.
        disk_bytes_per_s: BW_disk.
        cpu_bytes_per_s: BW_cpu: weights that the host's expert kernels read.
        cpu_mac_per_s: MAC_cpu: multiply-adds of the same kernels.
        launch_s: τ_k: one kernel more.
        fetch_s: τ_f: from the device to the host and back.
        cpu_call_s: τ_c: the same around experts of the host.

    Units: bytes, seconds.
    """

    name: str
    memory_bytes_per_s: float
    link_bytes_per_s: float = 0.0
    link_latency_s: float = 0.0
    host_bytes_per_s: float = 0.0
    disk_bytes_per_s: float = 0.0
    cpu_bytes_per_s: float = 0.0
    cpu_mac_per_s: float = 0.0
    launch_s: float = 0.0
    fetch_s: float = 0.0
    cpu_call_s: float = 0.0

    def bandwidths_only(self) -> Rates:
        """Without latencies: what a limit is made of; they are overhead, listed apart."""
        return replace(self, link_latency_s=0.0, launch_s=0.0, fetch_s=0.0, cpu_call_s=0.0)

    def within_host_memory(self) -> Rates:
        """With BW_cpu + BW_link at most BW_dram: the link keeps its rate, the CPU gets the rest."""
        if not self.host_bytes_per_s:
            return self
        link = min(self.link_bytes_per_s, self.host_bytes_per_s)
        cpu = min(self.cpu_bytes_per_s, self.host_bytes_per_s - link)
        return replace(self, link_bytes_per_s=link, cpu_bytes_per_s=cpu)


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerWork:
    """What one layer asks of a machine, in bytes; fractions are averages over tokens.

    Args:
        dense_bytes: Of everything but experts.
        launches: Kernels.
        hit_bytes: Σ_H: experts in a slot.
        fetched_bytes: Σ_F: experts that come over the link (where there is one) or from the disk.
        last_bytes: b_last: the expert that arrives last is computed behind its arrival; 0 in the
            limit, which lets bytes be computed as they come.
        cpu_bytes: Σ_C: experts that the host computes.
        cpu_macs: Multiply-adds of those.
        store_bytes: Of F and C, what is not in RAM.
    """

    dense_bytes: float = 0.0
    launches: int = 0
    hit_bytes: float = 0.0
    fetched_bytes: float = 0.0
    last_bytes: float = 0.0
    cpu_bytes: float = 0.0
    cpu_macs: float = 0.0
    store_bytes: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Terms:
    """Seconds of a layer by term; the sum of layers' terms for a step.

    Args:
        dense_s: Everything but experts, read from the slots' memory.
        launch_s: Kernels' launches.
        experts_s: Experts on the device, read from the slots' memory.
        link_s: Bytes over the link.
        cpu_s: Experts on the host.
        disk_s: Bytes from the disk.
    """

    dense_s: float = 0.0
    launch_s: float = 0.0
    experts_s: float = 0.0
    link_s: float = 0.0
    cpu_s: float = 0.0
    disk_s: float = 0.0

    @property
    def seconds(self) -> float:
        """T_l of the formulas.

        Of summed terms a bound below Σ T_l, and equal to it where all layers have one largest term.
        """
        overlapping = max(self.experts_s, self.link_s, self.cpu_s, self.disk_s)
        return self.dense_s + self.launch_s + overlapping

    @property
    def bound(self) -> str:
        """The largest term by its printed name: "h2d" is the link's."""
        terms = self.to_dict()
        return max(terms, key=lambda name: terms[name]).removesuffix("_s")

    def to_dict(self) -> dict[str, float]:
        """The terms as JSON spells them."""
        return {
            "h2d_s": self.link_s,
            "disk_s": self.disk_s,
            "cpu_s": self.cpu_s,
            "experts_s": self.experts_s,
            "dense_s": self.dense_s,
            "launch_s": self.launch_s,
        }

    def __add__(self, other: Terms) -> Terms:
        return Terms(
            dense_s=self.dense_s + other.dense_s,
            launch_s=self.launch_s + other.launch_s,
            experts_s=self.experts_s + other.experts_s,
            link_s=self.link_s + other.link_s,
            cpu_s=self.cpu_s + other.cpu_s,
            disk_s=self.disk_s + other.disk_s,
        )


def link_seconds(rates: Rates, num_bytes: float) -> float:
    """T_link of bytes that were not there when the layer asked."""
    fetch_s = rates.fetch_s if num_bytes else 0.0
    return fetch_s + _seconds(num_bytes, rates.link_bytes_per_s)


def copy_seconds(rates: Rates, num_bytes: float) -> float:
    """One copy alone on the link: t0 + bytes/BW."""
    return rates.link_latency_s + _seconds(num_bytes, rates.link_bytes_per_s)


def cpu_seconds(rates: Rates, num_bytes: float, macs: float = 0.0) -> float:
    """T_cpu of experts with the same number of tokens each."""
    call_s = rates.cpu_call_s if num_bytes else 0.0
    return call_s + max(
        _seconds(num_bytes, rates.cpu_bytes_per_s), _seconds(macs, rates.cpu_mac_per_s)
    )


def disk_seconds(rates: Rates, num_bytes: float) -> float:
    """T_disk."""
    return _seconds(num_bytes, rates.disk_bytes_per_s)


def layer_terms(rates: Rates, work: LayerWork) -> Terms:
    """The terms of T_l; `seconds` is T_l."""
    memory = rates.memory_bytes_per_s
    over_link = work.fetched_bytes if rates.link_bytes_per_s else 0.0
    return Terms(
        dense_s=_seconds(work.dense_bytes, memory),
        launch_s=work.launches * rates.launch_s,
        experts_s=_seconds(work.hit_bytes + work.fetched_bytes, memory),
        link_s=link_seconds(rates, over_link) + _seconds(work.last_bytes, memory),
        cpu_s=cpu_seconds(rates, work.cpu_bytes, work.cpu_macs),
        disk_s=disk_seconds(rates, work.store_bytes),
    )


def step_seconds(rates: Rates, layers: Iterable[LayerWork]) -> float:
    """T_step."""
    return sum(layer_terms(rates, work).seconds for work in layers)


def step_terms(rates: Rates, layers: Iterable[LayerWork]) -> Terms:
    """The terms of a step, summed over its layers."""
    total = Terms()
    for work in layers:
        total += layer_terms(rates, work)
    return total


def prefetch_seconds(rates: Rates, layers: Iterable[LayerWork]) -> float:
    """What no prefetch can go below: it hides at most the device's own time."""
    terms = step_terms(rates.bandwidths_only(), [replace(work, last_bytes=0.0) for work in layers])
    return max(terms.dense_s + terms.experts_s, terms.link_s)


def cpu_share(rates: Rates) -> float:
    """The part of missed bytes that the host computes when it and the link end together."""
    return rates.cpu_bytes_per_s / (rates.cpu_bytes_per_s + rates.link_bytes_per_s)


def goes_to_cpu(
    rates: Rates,
    expert_bytes: float,
    *,
    num_tokens: int,
    queued_cpu_s: float = 0.0,
    queued_link_s: float = 0.0,
) -> bool:
    """Whether the host is done with a missed expert before the link has brought it.

    Up to four tokens cost the host what one costs, because it is bound by the weights.
    """
    cpu_s = _seconds(expert_bytes, rates.cpu_bytes_per_s) * max(1.0, num_tokens / 4)
    return queued_cpu_s + cpu_s < queued_link_s + _seconds(expert_bytes, rates.link_bytes_per_s)


def distinct_experts(num_experts: int, top_k: int, batch: int) -> float:
    """|A|(B): distinct experts of a layer that a batch asks for, were routing uniform."""
    return num_experts * (1 - (1 - top_k / num_experts) ** batch)


def _seconds(amount: float, rate: float) -> float:
    return amount / rate if rate else 0.0
