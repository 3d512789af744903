"""The limit model against its worked tables, and against what sessions did."""

from __future__ import annotations

from dataclasses import fields, replace
from types import SimpleNamespace

import pytest

from sluice import limit
from sluice.doctor import Constants, DeviceConstants
from sluice.limit import LayerWork, Limit, MoeModel, Rates, Terms
from sluice.report import phase_text, report_text
from sluice.stats import Stats

GB = 1e9
# What the worked tables assume: no latencies, no disk and no CPU unless a column names them.
PCIE5 = Rates(name="PCIe 5", memory_bytes_per_s=4200 * GB, link_bytes_per_s=55 * GB)
PCIE4 = replace(PCIE5, link_bytes_per_s=25 * GB)
CPU24 = replace(PCIE5, cpu_bytes_per_s=24 * GB)
CPU120 = replace(PCIE5, cpu_bytes_per_s=120 * GB)
NVME = replace(PCIE5, disk_bytes_per_s=7 * GB)

# Bits per weight: int8 and int4 have an fp16 scale per 64 weights, and int8's scale serves both of
# its halves.
BITS = {"bf16": 16, "int8": 8.25, "int4": 4.25}
SHAPES = {
    # layers, experts, K, weights of an expert, dense bytes per token in bf16
    "mixtral": (32, 8, 2, 3 * 4096 * 14336, 2.95 * GB),
    "qwen3": (48, 128, 8, 3 * 2048 * 768, 2.431 * GB),
}

# miss GB; milliseconds on misses: PCIe 5, PCIe 4, CPU 24, CPU 120, NVMe; tok/s: link, link + CPU.
WORKED = {
    ("mixtral", "bf16", 0.1): "20.3 369 812 846 169 2899 2.7 8.6",
    ("mixtral", "bf16", 0.5): "11.3 205 451 470 94 1611 4.9 15",
    ("mixtral", "bf16", 0.9): "2.3 41 90 94 19 322 24 74",
    ("mixtral", "int8", 0.1): "10.5 190 419 436 87 1495 5.2 17",
    # The table has 831 and 30 here: 830.47 and 29.48, rounded twice.
    ("mixtral", "int8", 0.5): "5.8 106 233 242 48 830 9.4 29",
    ("mixtral", "int8", 0.9): "1.2 21 47 48 9.7 166 46 136",
    ("mixtral", "int4", 0.1): "5.4 98 216 225 45 770 10 32",
    ("mixtral", "int4", 0.5): "3.0 54 120 125 25 428 18 56",
    ("mixtral", "int4", 0.9): "0.60 11 24 25 5.0 86 86 242",
    ("qwen3", "bf16", 0.1): "3.26 59 130 136 27 466 17 52",
    ("qwen3", "bf16", 0.5): "1.81 33 72 75 15 259 30 91",
    ("qwen3", "bf16", 0.9): "0.36 6.6 14 15 3.0 52 140 377",
    ("qwen3", "int8", 0.1): "1.68 31 67 70 14 240 32 98",
    ("qwen3", "int8", 0.5): "0.93 17 37 39 7.8 133 57 169",
    ("qwen3", "int8", 0.9): "0.19 3.4 7.5 7.8 1.6 27 251 607",
    ("qwen3", "int4", 0.1): "0.87 16 35 36 7.2 124 61 181",
    ("qwen3", "int4", 0.5): "0.48 8.8 19 20 4.0 69 107 300",
    ("qwen3", "int4", 0.9): "0.096 1.8 3.9 4.0 0.8 14 429 886",
}
# MB of an expert, GB of a token's, GB of all, milliseconds and tok/s with all resident.
RESIDENT = {
    ("mixtral", "bf16"): "352 22.5 90.2 6.07 165",
    ("mixtral", "int8"): "182 11.6 46.5 3.47 288",
    ("mixtral", "int4"): "93.6 5.99 24.0 2.13 470",
    ("qwen3", "bf16"): "9.44 3.62 58.0 1.44 694",
    ("qwen3", "int8"): "4.87 1.87 29.9 1.02 977",
    ("qwen3", "int4"): "2.51 0.96 15.4 0.81 1238",
}


def model(name: str, bits: str = "bf16") -> MoeModel:
    layers, experts, top_k, weights, dense = SHAPES[name]
    return MoeModel(
        num_layers=layers,
        num_experts=experts,
        top_k=top_k,
        expert_bytes=weights * BITS[bits] / 8,
        dense_bytes=dense,
    )


def printed_like(value: float, figure: str) -> str:
    """`value` with the decimals of `figure`."""
    return f"{value:.{len(figure.partition('.')[2])}f}"


@pytest.mark.parametrize("row", WORKED, ids=lambda row: f"{row[0]}-{row[1]}-{row[2]:.0%}")
def test_every_row_of_the_worked_table_comes_out(row: tuple[str, str, float]) -> None:
    name, bits, resident = row
    moe = model(name, bits)

    def token(rates: Rates, **how: object) -> Terms:
        return limit.expected_token(moe, rates, resident, **how)  # type: ignore[arg-type]

    found = (
        moe.missed_bytes(resident) / GB,
        token(PCIE5).link_s * 1e3,
        token(PCIE4).link_s * 1e3,
        token(CPU24, misses="cpu").cpu_s * 1e3,
        token(CPU120, misses="cpu").cpu_s * 1e3,
        token(NVME, in_ram_share=0.0).disk_s * 1e3,
        1 / token(PCIE5).seconds,
        1 / token(CPU120, misses="split").seconds,
    )
    figures = WORKED[row].split()
    shown = [printed_like(value, f) for value, f in zip(found, figures, strict=True)]
    assert shown == figures


@pytest.mark.parametrize("row", RESIDENT, ids="-".join)
def test_sizes_and_the_step_with_everything_resident_come_out(row: tuple[str, str]) -> None:
    moe = model(*row)
    seconds = limit.expected_token(moe, PCIE5, 1.0).seconds
    found = (
        moe.expert_bytes / 1e6,
        moe.token_bytes / GB,
        moe.total_bytes / GB,
        seconds * 1e3,
        1 / seconds,
    )
    figures = RESIDENT[row].split()
    assert [printed_like(value, f) for value, f in zip(found, figures, strict=True)] == figures


@pytest.mark.parametrize(
    ("name", "bits", "figures"),
    [("mixtral", "int4", "1.3 6 13"), ("qwen3", "int4", "7 33 66")],
)
def test_what_perfect_prefetch_gains(name: str, bits: str, figures: str) -> None:
    moe = model(name, bits)
    for resident, figure in zip((0.5, 0.9, 0.95), figures.split(), strict=True):
        works = works_of(moe, resident)
        gain = limit.step_seconds(PCIE5, works) / limit.prefetch_seconds(PCIE5, works) - 1
        assert printed_like(100 * gain, figure) == figure


@pytest.mark.parametrize(
    ("name", "bits", "figure"),
    [
        ("mixtral", "bf16", "98.5"),
        ("mixtral", "int4", "98.0"),
        ("qwen3", "bf16", "97.8"),
        ("qwen3", "int4", "95.4"),
    ],
)
def test_where_the_link_stops_binding_a_perfect_prefetch(name: str, bits: str, figure: str) -> None:
    def bound_by_link(resident: float) -> bool:
        works = works_of(model(name, bits), resident)
        return limit.prefetch_seconds(PCIE5, works) == limit.step_terms(PCIE5, works).link_s

    assert bound_by_link(float(figure) / 100 - 0.001)
    assert not bound_by_link(float(figure) / 100 + 0.001)


def works_of(moe: MoeModel, resident: float) -> list[LayerWork]:
    layers = moe.num_layers
    work = limit.missed_work(
        PCIE5,
        dense_bytes=moe.dense_bytes / layers,
        asked_bytes=moe.token_bytes / layers,
        missed_bytes=moe.missed_bytes(resident) / layers,
    )
    return [work] * layers


@pytest.mark.parametrize(
    ("name", "figures"), [("mixtral", "2.0 3.5 5.5 7.2 7.9"), ("qwen3", "8 15.5 29 52 82")]
)
def test_distinct_experts_of_a_batch(name: str, figures: str) -> None:
    _, experts, top_k, *_ = SHAPES[name]
    for batch, figure in zip((1, 2, 4, 8, 16), figures.split(), strict=True):
        assert printed_like(limit.distinct_experts(experts, top_k, batch), figure) == figure


def test_experts_are_read_once_where_they_are_computed() -> None:
    moe = model("mixtral")
    token = limit.expected_token(moe, PCIE5, 0.5)
    assert token.experts_s == pytest.approx(moe.token_bytes / PCIE5.memory_bytes_per_s)
    split = limit.expected_token(moe, CPU120, 0.5, misses="split")
    assert split.cpu_s == pytest.approx(split.link_s)
    # Of the missed half the host computes 120 parts of 175, which the device never reads.
    on_device = moe.token_bytes * (1 - 0.5 * 120 / 175)
    assert split.experts_s == pytest.approx(on_device / PCIE5.memory_bytes_per_s)


def test_hand_offs_in_every_layer_add_what_the_table_says() -> None:
    for name, low_s, high_s in (("mixtral", 0.5e-3, 0.65e-3), ("qwen3", 0.75e-3, 1.0e-3)):
        without = limit.expected_token(model(name), PCIE5, 0.5).seconds
        for fetch_s in (16e-6, 20e-6):
            rates = replace(PCIE5, fetch_s=fetch_s)
            added = limit.expected_token(model(name), rates, 0.5).seconds - without
            assert low_s < added < high_s
        # Where nothing is missed nothing is handed over.
        assert limit.expected_token(model(name), rates, 1.0) == limit.expected_token(
            model(name), PCIE5, 1.0
        )


def test_a_layer_takes_its_largest_term_behind_dense_part_and_launches() -> None:
    rates = Rates(
        name="round",
        memory_bytes_per_s=100.0,
        link_bytes_per_s=10.0,
        disk_bytes_per_s=2.0,
        cpu_bytes_per_s=5.0,
        cpu_mac_per_s=50.0,
        launch_s=0.5,
        fetch_s=0.25,
        cpu_call_s=0.125,
    )
    work = LayerWork(
        dense_bytes=200,
        launches=3,
        hit_bytes=100,
        fetched_bytes=40,
        last_bytes=20,
        cpu_bytes=10,
        cpu_macs=200,
        store_bytes=6,
    )
    terms = limit.layer_terms(rates, work)
    assert terms == Terms(
        dense_s=2.0, launch_s=1.5, experts_s=1.4, link_s=0.25 + 4 + 0.2, cpu_s=4.125, disk_s=3.0
    )
    assert terms.seconds == 2.0 + 1.5 + 4.45
    assert terms.bound == "h2d"
    assert limit.step_seconds(rates, [work, work]) == 2 * terms.seconds
    slower = replace(rates, disk_bytes_per_s=1.0)
    assert limit.layer_terms(slower, work).bound == "disk"
    bare = limit.layer_terms(rates.bandwidths_only(), work)
    assert bare.seconds == 2.0 + 4.2
    assert limit.prefetch_seconds(rates, [work]) == 4.0
    assert limit.copy_seconds(replace(rates, link_latency_s=1.0), 10) == 2.0


def test_steps_add_the_largest_term_of_each_layer() -> None:
    works = [LayerWork(hit_bytes=4200 * GB), LayerWork(fetched_bytes=110 * GB)]
    assert limit.step_seconds(PCIE5, works) == pytest.approx(1.0 + 2.0)
    # Summed terms alone would let the one layer's link hide behind the other's experts.
    assert limit.step_terms(PCIE5, works).seconds == pytest.approx(2.0)


def test_the_host_and_the_link_share_the_memory_that_both_read() -> None:
    rates = replace(CPU120, host_bytes_per_s=130 * GB).within_host_memory()
    assert rates.link_bytes_per_s == 55 * GB
    assert rates.cpu_bytes_per_s == 75 * GB
    roomy = replace(CPU120, host_bytes_per_s=200 * GB)
    assert roomy.within_host_memory() == roomy
    assert limit.cpu_share(CPU120) == pytest.approx(120 / 175)


def test_a_missed_expert_goes_where_it_is_done_first() -> None:
    expert = 100e6
    assert limit.goes_to_cpu(CPU120, expert, num_tokens=4)
    assert not limit.goes_to_cpu(CPU120, expert, num_tokens=16)
    assert not limit.goes_to_cpu(CPU24, expert, num_tokens=1)
    assert limit.goes_to_cpu(CPU24, expert, num_tokens=1, queued_link_s=1.0)
    assert not limit.goes_to_cpu(CPU120, expert, num_tokens=1, queued_cpu_s=1.0)


def test_a_way_to_serve_misses_that_there_is_not_is_refused() -> None:
    with pytest.raises(ValueError, match=r"misses: got 'gpu', expected one of link, cpu, split"):
        limit.expected_token(model("mixtral"), PCIE5, 0.5, misses="gpu")


def test_assumed_machines_are_named_and_are_those_of_the_worked_table() -> None:
    named = {machine.name: machine for machine in limit.REFERENCE_MACHINES}
    assert set(named) == {"PCIe 5 x16, H200 class", "PCIe 4 x16"}
    for machine, rates in zip(limit.REFERENCE_MACHINES, (PCIE5, PCIE4), strict=True):
        assert machine.link_bytes_per_s == rates.link_bytes_per_s
        assert machine.memory_bytes_per_s == rates.memory_bytes_per_s
        assert machine == machine.bandwidths_only()


# ---- what sessions did ----

HOST = Constants(10 * GB, {"1x1MiB": 0.5 * GB, "4x1MiB": 1 * GB}, 1.0)


def session(device: str, num_layers: int = 2, expert_bytes: int = 1000) -> SimpleNamespace:
    layer = {"expert_bytes": expert_bytes}
    store = SimpleNamespace(num_layers=num_layers, layer=lambda _: layer)
    return SimpleNamespace(store=store, device=device)


def test_a_session_on_the_cpu_has_the_limit_of_its_disk_and_memory() -> None:
    spent = Stats(
        forwards=6,
        requests=40,
        bytes_read=35_000,
        bytes_read_demand=30_000,
        bytes_read_hint_used=5000,
    )
    found = limit.limit_of(session("cpu"), spent, HOST, dense_bytes=500)
    assert found == Limit(
        disk_s=30_000 / GB, experts_s=40_000 / (10 * GB), dense_s=3 * 500 / (10 * GB)
    )
    assert found.seconds == pytest.approx(1.5e-7 + 3e-5)
    assert found.bound == "disk"
    fields = found.to_dict(1e-4)
    assert set(fields) == {"limit_s", "disk_s", "experts_s", "dense_s", "bound", "achieved"}
    assert fields["achieved"] == pytest.approx(found.seconds / 1e-4)


def test_without_a_figure_of_the_disk_memory_bounds() -> None:
    spent = Stats(forwards=2, requests=8, bytes_read_demand=30_000)
    found = limit.limit_of(session("cpu"), spent, Constants(10 * GB, {}, 1.0), dense_bytes=0)
    assert found is not None
    assert found.disk_s == 0.0
    assert found.bound == "experts"
    assert limit.host_limit(Stats(), limit.host_rates(HOST), 0.0, 0.0).bound == "disk"


def test_beside_a_gpu_without_measured_constants_there_is_no_limit() -> None:
    assert limit.limit_of(session("cuda:0"), Stats(forwards=2), HOST, dense_bytes=0) is None


def test_a_gpu_that_was_not_measured_has_no_limit() -> None:
    known = {entry.name: 1.0 for entry in fields(DeviceConstants)}
    device = DeviceConstants(**known | {"name": "g", "device": "cuda:0", "copies_bytes_per_s": {}})  # type: ignore[arg-type]
    measured = replace(HOST, device=device)
    spent = Stats(forwards=2)
    assert limit.limit_of(session("cuda:0"), spent, measured, dense_bytes=1) is not None
    assert limit.limit_of(session("cuda:1"), spent, measured, dense_bytes=1) is None


GPU = Rates(
    name="doctor, NVIDIA H200",
    memory_bytes_per_s=4200 * GB,
    link_bytes_per_s=55 * GB,
    disk_bytes_per_s=5 * GB,
    fetch_s=20e-6,
    launch_s=4e-6,
)


def test_beside_a_gpu_the_bytes_that_steps_needed_make_the_limit() -> None:
    spent = Stats(
        forwards=48,
        requests=384,
        hits=192,
        misses=192,
        bytes_read=int(0.59 * GB),
        bytes_read_demand=int(0.55 * GB),
        bytes_read_hint_wasted=int(0.04 * GB),
    )
    found = limit.device_limit(spent, GPU, expert_bytes=2.5e6, dense_bytes=2.43 * GB)
    assert found.h2d_s == pytest.approx(0.55 / 55)
    assert found.dense_s == pytest.approx(2.43 / 4200)
    assert found.experts_s == pytest.approx(384 * 2.5e6 / 4.2e12)
    assert found.disk_s == 0.0
    assert found.seconds == pytest.approx(found.h2d_s + found.dense_s)
    assert found.bound == "h2d"
    assert found.wasted_s == pytest.approx(0.04 / 55)
    assert found.overhead_s == pytest.approx(48 * 20e-6)
    fields = found.to_dict(0.0172)
    assert fields["achieved"] == pytest.approx((0.01 + 2.43 / 4200) / 0.0172)
    assert fields["unexplained_s"] == pytest.approx(
        0.0172 - found.seconds - found.overhead_s - found.wasted_s
    )
    assert fields["constants"] == "doctor, NVIDIA H200"
    assert {"limit_s", "disk_s", "experts_s", "dense_s", "bound", "achieved", "h2d_s"} < set(fields)


def test_what_a_hint_brought_in_time_may_hide_behind_everything_else() -> None:
    asked = Stats(requests=4, bytes_read_demand=int(GB), bytes_read=int(2 * GB))
    hinted = replace(asked, bytes_read_demand=0, bytes_read_hint_used=int(2 * GB))
    demanded = replace(asked, bytes_read_demand=int(2 * GB))
    dense = 4200 * GB * 0.02
    limits = [limit.device_limit(s, GPU, 0.5 * GB, dense).seconds for s in (hinted, demanded)]
    assert limits == [pytest.approx(2 / 55), pytest.approx(2 / 55 + 0.02)]


def test_the_host_tiers_own_filling_is_not_what_a_step_needed() -> None:
    filling = Stats(requests=8, host_hits=6, host_misses=2, store_bytes_read=int(50 * GB))
    found = limit.device_limit(filling, GPU, expert_bytes=GB, dense_bytes=0.0)
    assert found.disk_s == pytest.approx(2 * GB / (5 * GB))
    assert found.bound == "disk"


def test_a_phase_beside_a_gpu_is_told_with_its_limit_and_what_is_left_to_explain() -> None:
    """The design's example: decoding on an H200, half of the experts resident."""
    tokens = 256
    spent = Stats(
        forwards=48 * tokens,
        requests=1000 * tokens,
        hits=501 * tokens,
        misses=499 * tokens,
        bytes_read=590_000_000 * tokens,
        bytes_read_demand=540_000_000 * tokens,
        bytes_read_hint_wasted=50_000_000 * tokens,
    )
    rates = replace(GPU, link_bytes_per_s=54.9 * GB, fetch_s=18.4e-6)
    found = limit.device_limit(spent, rates, expert_bytes=1e6, dense_bytes=2.43 * GB * tokens)
    lines = phase_text("decode", spent, found, 17.2e-3 * tokens, tokens).splitlines()
    assert lines == [
        "decode 256 tok   58.1 tok/s   17.2 ms/tok   limit 10.4 ms (h2d 9.84, disk 0, experts "
        "0.238, dense 0.579)   achieved 0.61   bound: h2d",
        "  hits 50.1 %   h2d 0.59 GB @ 54.9 GB/s (demand 0.54, hint used 0, hint wasted 0.05, "
        "hint pending 0)   disk 0 GB",
        "  wasted hints 0.911 ms   known overhead 0.883 ms (48 hand-offs x 18.4 us)   "
        "unexplained 4.99 ms   constants: doctor, NVIDIA H200",
    ]
    stale = phase_text("decode", spent, found, 5e-3 * tokens, tokens)
    assert "achieved 2.08, run `sluice doctor` again" in stale


def test_a_report_beside_a_gpu_tells_the_links_share_and_one_on_the_cpu_none() -> None:
    spent = Stats(bytes_read=4 << 30, bytes_read_demand=4 << 30, demand_s=0.1)
    classes = [{"num_slots": 1, "num_experts": 2}]
    on_cpu = report_text(spent, classes, "s", "lru")
    assert "  read 4.0 GiB (demand 4.0 GiB), 42.95 GB/s while demands were in flight\n" in on_cpu
    on_gpu = report_text(replace(spent, host_tier_bytes=1), classes, "s", "lru", 55 * GB)
    assert "over the link 4.0 GiB (demand 4.0 GiB), 42.95 GB/s" in on_gpu
    assert "achieved 0.78 of the link's 55.0" in on_gpu
