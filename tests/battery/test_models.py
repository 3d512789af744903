"""Whole models: the output is the same bits wherever the experts lie, and stock's within rounding.

For every family the covering array of `FACTORS` runs; on five models, each unlike the others, the
full product of the storage factors (`make test-long`: on all).
"""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
import torch
from torch import nn

from . import zoo
from .cells import DTYPES, FACTORS, STORAGE, Bench, Row, compare, hinting, run, run_on_routes
from .families import causal_families, present, zoo_classes
from .pairwise import covering_rows, full_product
from .tally import COUNTS
from .test_coverage import NOT_BUILT

FAMILIES = [e.family for e in causal_families() if e.family not in NOT_BUILT["models"]]
OFFLOADED = [family for family in FAMILIES if family not in NOT_BUILT["refused"]]
# Gated and plain; biased, interleaved and transposed; grouped routing beside shared experts; no
# gate; experts outside any block.
IN_FULL = ("mixtral", "gpt_oss", "deepseek_v3", "nemotron_h", "gemma4")  # in every release
COVERING = covering_rows(FACTORS)
ZOO = zoo.CAUSAL_LMS + zoo.REFUSED
BenchOf = Callable[[str], Bench]


def _id(row: Row) -> str:
    return "-".join(str(value).replace("-", "_") for value in row.values())


def _full_rows() -> list[Row]:
    """The storage factors' product; dtype and style change from row to row, the same each time."""
    rng = random.Random(0)
    others = {name: FACTORS[name] for name in FACTORS if name not in STORAGE}
    return [
        row | {name: rng.choice(values) for name, values in others.items()}
        for row in full_product(STORAGE)
    ]


FULL = _full_rows()


@pytest.mark.parametrize("cell", COVERING, ids=_id)
@pytest.mark.parametrize("family", OFFLOADED)
def test_output_is_the_same_bits_and_stocks_within_rounding(
    family: str, cell: Row, bench_of: BenchOf
) -> None:
    check_cell(bench_of(family), cell)


@pytest.mark.parametrize("cell", FULL, ids=_id)
@pytest.mark.parametrize("family", IN_FULL)
def test_output_is_the_same_in_every_combination(family: str, cell: Row, bench_of: BenchOf) -> None:
    check_cell(bench_of(family), cell)


@pytest.mark.long
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("family", [f for f in OFFLOADED if f not in IN_FULL])
def test_output_is_the_same_in_every_combination_of_every_family(
    family: str, bench_of: BenchOf
) -> None:
    for cell in FULL:  # one test: ten thousand would take longer to collect than to run
        try:
            check_cell(bench_of(family), cell)
        except AssertionError as error:
            raise AssertionError(f"{_id(cell)}: {error}") from error


def check_cell(bench: Bench, cell: Row) -> torch.Tensor:
    """Returns the prompt's logits on stock's routes."""
    dtype = cell["dtype"]
    if dtype not in bench.dtypes:
        COUNTS[f"cells in fp32 because stock itself has no {dtype} ({bench.built.name})"] += 1
        dtype = "fp32"
        cell = cell | {"dtype": dtype}
    reference = bench.reference(dtype)
    sites = bench.built.sites
    with bench.offloaded(cell) as model:
        assert _slots(model) in _expected_slots(bench, cell)
        ours = run(model, sites, bench.ids, hinting(model, cell["hints"]))
        stats = model.sluice.stats()
        forced = ours.logits
        if dtype != "fp32":
            forced = run_on_routes(model, sites, bench.ids, reference.routes)
    first_cell, first = bench.bits.setdefault((dtype, torch.get_num_threads()), (cell, ours))
    assert ours.same_bits(first), f"other bits than {_id(first_cell)}"
    assert stats.peak_resident_bytes <= stats.budget_bytes
    assert stats.requests == stats.hits + stats.late + stats.misses
    outcome = compare(bench, dtype, ours, forced)
    COUNTS[f"cells in {dtype}"] += 1
    COUNTS[f"positions in {dtype}"] += outcome.positions
    COUNTS[f"positions in {dtype} rerouted by rounding"] += outcome.rerouted
    COUNTS[f"new tokens in {dtype} compared"] += outcome.tokens
    COUNTS[f"rows in {dtype} ended by a near tie of stock's own"] += outcome.near_ties
    assert outcome.error <= outcome.allowed
    assert outcome.tokens_equal
    assert not (dtype == "fp32" and outcome.rerouted)
    if cell["backing"] in ("ram", "spilled"):
        assert_restored(bench, dtype)
    return forced


def _slots(model: nn.Module) -> int:
    return sum(len(size_class) for size_class in model.sluice.residency())


def _expected_slots(bench: Bench, cell: Row) -> tuple[int, ...]:
    modules = [bench.built.model.get_submodule(site) for site in bench.built.sites]
    experts = sum(module.down_proj.shape[0] for module in modules)
    if cell["backing"] == "ram" and cell["slots"] == "all":
        return 0, experts  # what all fits is computed where it lies, if it lies as slots would
    return ({"one": 1, "quarter": experts // 4, "all": experts}[cell["slots"]],)


def assert_restored(bench: Bench, dtype: str) -> None:
    """The stock model is itself again: same modules, same bits, no trace of sluice."""
    model, state = bench.stock(dtype), bench.state(dtype)
    now = model.state_dict()
    assert now.keys() == state.keys()
    assert all(torch.equal(now[name], state[name]) for name in state)
    assert not hasattr(model, "sluice")
    for site in bench.built.sites:
        assert type(model.get_submodule(site)) is type(bench.built.model.get_submodule(site))


@pytest.mark.parametrize("family", OFFLOADED)
def test_a_wrong_expert_is_seen(family: str, bench_of: BenchOf) -> None:
    """The control: one zeroed expert moves the logits by more than the tolerance allows."""
    bench = bench_of(family)
    stock = bench.reference("fp32")
    model = bench.stock("fp32")
    last = model.get_submodule(bench.built.sites[-1])
    used = int(stock.routes[stock.calls_per_forward - 1][0][0, 0])
    kept = last.down_proj.detach()[used].clone()
    with torch.no_grad():
        last.down_proj[used] = 0
        try:
            wrong = run(model, bench.built.sites, bench.ids)
        finally:
            last.down_proj[used] = kept
    assert not wrong.same_bits(stock)
    error = (wrong.logits - stock.logits).abs().max().item()
    assert error > bench.tolerance("fp32", stock.logits.abs().max().item())


@pytest.mark.parametrize("family", OFFLOADED)
def test_restore_after_loading_gives_the_stock_model(family: str, bench_of: BenchOf) -> None:
    import sluice

    bench = bench_of(family)
    cell = {"slots": "quarter", "policy": "lru", "backing": "shards"}
    cell |= {"dtype": "fp32", "style": "per-expert"}
    with bench.offloaded(cell) as model:
        sluice.restore(model)
        state = model.state_dict()
        assert state.keys() == bench.state("fp32").keys()
        assert all(torch.equal(state[name], bench.state("fp32")[name]) for name in state)
        model.set_experts_implementation("eager")
        assert run(model, bench.built.sites, bench.ids).same_bits(bench.reference("fp32"))


def test_a_family_on_the_list_is_refused_with_the_listed_reason(bench_of: BenchOf) -> None:
    import sluice

    for family, reason in NOT_BUILT["refused"].items():
        with pytest.raises(sluice.UnsupportedModelError) as refusal:
            sluice.offload(bench_of(family).stock("fp32"), device_memory="25%")
        assert str(refusal.value).startswith(reason)


@pytest.mark.parametrize("tiny", present(ZOO, decorated=False), ids=lambda tiny: tiny.name)
def test_experts_outside_the_interface_are_refused_by_name(tiny: zoo.ZooModel) -> None:
    import sluice

    config_class, cls = zoo_classes(tiny)
    model = cls(config_class(**tiny.full_kwargs())).eval()
    before = {name: type(module) for name, module in model.named_modules()}
    with pytest.raises(sluice.UnsupportedModelError, match=cls.__name__):
        sluice.offload(model, device_memory="25%")
    assert {name: type(module) for name, module in model.named_modules()} == before


def test_every_dtype_of_the_factors_is_known() -> None:
    assert set(FACTORS["dtype"]) == set(DTYPES)
